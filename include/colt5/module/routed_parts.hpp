// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstddef>
#include <type_traits>

#include <colt5/module/config.hpp>
#include <colt5/module/token_module.hpp>

/// What a Routed consists of, by its configuration.
namespace colt5 {

/// The parts of Routed, or of its Gradients. A template like this one, with three members in this order, gives them
/// other names.
template <typename Router, typename Light, typename Heavy>
struct RoutedParts {
    static constexpr const char *light_name = "light", *heavy_name = "heavy";

    Router router;
    Light light;
    Heavy heavy;  // one module, or an array of one for each route
};

namespace detail {

template <RoutedConfig config, typename Scalar, typename P, typename Heavy, typename Light>
struct ExpectRouted {
    static_assert(is_module_scalar<Scalar, P>,
                  "colt5: modules compute in float or double, on Cuda also in bfloat16 or float16");
    static_assert(config.dim >= 1, "colt5: RoutedConfig.dim must be at least 1");
    static_assert(config.num_heavy_tokens >= 1, "colt5: RoutedConfig.num_heavy_tokens must be at least 1");
    static_assert(config.num_routes >= 1, "colt5: RoutedConfig.num_routes must be at least 1");
    static_assert(sizeof(ExpectTokenModule<Heavy, Scalar, P>) > 0 && sizeof(ExpectTokenModule<Light, Scalar, P>) > 0);
};

/// T, or an array of `count`
template <typename T, Index count>
using OneOrArray = std::conditional_t<count == 1, T, std::array<T, static_cast<std::size_t>(count)>>;

constexpr Index heavy_modules(const RoutedConfig& config) {
    return config.shared_heavy ? 1 : config.num_routes;
}
constexpr RouterConfig router_config(const RoutedConfig& config) {
    return {.dim = config.dim,
            .num_routing_tokens = config.num_routes,
            .straight_through = config.router_straight_through,
            .router_type = config.router_type,
            .kwargs = config.router_kwargs};
}

}  // namespace detail

}  // namespace colt5
