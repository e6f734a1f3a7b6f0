// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/router/block_router.hpp>
#include <colt5/router/causal_router.hpp>
#include <colt5/router/coordinate_descent_router.hpp>
#include <colt5/router/differentiable_top_k_router.hpp>
#include <colt5/router/sinkhorn_router.hpp>

namespace colt5 {

/// The router template of a router type: RouterOf<RouterType::sinkhorn>::type<config, Scalar, Policy>.
template <RouterType router_type>
struct RouterOf;

template <>
struct RouterOf<RouterType::coor_descent> {
    template <RouterConfig config, typename Scalar, typename P>
    using type = CoordinateDescentRouter<config, Scalar, P>;
};
template <>
struct RouterOf<RouterType::cum_softmax> {
    template <RouterConfig config, typename Scalar, typename P>
    using type = DifferentiableTopKRouter<config, Scalar, P>;
};
template <>
struct RouterOf<RouterType::sinkhorn> {
    template <RouterConfig config, typename Scalar, typename P>
    using type = SinkhornRouter<config, Scalar, P>;
};
template <>
struct RouterOf<RouterType::causal> {
    template <RouterConfig config, typename Scalar, typename P>
    using type = CausalRouter<config, Scalar, P>;
};

namespace detail {
template <typename Inner, Index block_size, typename Scalar, typename P>
struct InBlocks {
    using type = BlockRouter<Inner, block_size, Scalar, P>;
};
template <typename Inner, typename Scalar, typename P>
struct InBlocks<Inner, 0, Scalar, P> {
    using type = Inner;
};
}  // namespace detail

/// The router that a configuration names, in blocks if it says so, which is what modules route with unless they are
/// given another template. It is one template for all configurations: g++ 12 fails where the template itself depends on
/// a template parameter.
template <RouterConfig config, typename Scalar, typename P>
using ConfiguredRouter =
    typename detail::InBlocks<typename RouterOf<config.router_type>::template type<config, Scalar, P>,
                              config.kwargs.route_block_size, Scalar, P>::type;

}  // namespace colt5
