// SPDX-License-Identifier: MIT
#pragma once

#include <type_traits>

#include <colt5/module/config.hpp>
#include <colt5/module/feed_forward.hpp>
#include <colt5/module/gated_feed_forward.hpp>
#include <colt5/module/routed.hpp>

namespace colt5 {

namespace detail {

/// dim · mult without its fraction, or 0 if the product is less than 1 or more than 2^40.
constexpr Index hidden_width(Index dim, double mult) {
    const double width = static_cast<double>(dim) * mult;
    return width >= 1 && width <= 0x1p40 ? static_cast<Index>(width) : 0;
}

/// The RoutedConfig and the two branches of a feedforward with this configuration.
template <FeedForwardConfig config>
struct RoutedFeedForward {
    static_assert(config.dim >= 1, "colt5: FeedForwardConfig.dim must be at least 1");
    static_assert(config.num_heavy_tokens >= 1, "colt5: FeedForwardConfig.num_heavy_tokens must be at least 1");
    static_assert(hidden_width(config.dim, config.light_ff_mult) > 0,
                  "colt5: FeedForwardConfig.light_ff_mult times dim must be at least 1 and at most 2^40");
    static_assert(hidden_width(config.dim, config.heavy_ff_mult) > 0,
                  "colt5: FeedForwardConfig.heavy_ff_mult times dim must be at least 1 and at most 2^40");

    static constexpr RoutedConfig routed{.dim = config.dim,
                                         .num_heavy_tokens = config.num_heavy_tokens,
                                         .router_straight_through = config.router_straight_through,
                                         .router_type = config.router_type,
                                         .router_kwargs = config.router_kwargs};
    template <Index hidden, typename Scalar, typename P>
    using Branch = std::conditional_t<config.feed_forward == FeedForwardType::gated,
                                      SizedGatedFeedForward<config.dim, hidden, Scalar, P>,
                                      SizedFeedForward<config.dim, hidden, Scalar, P>>;
    template <typename Scalar, typename P>
    using Light = Branch<hidden_width(config.dim, config.light_ff_mult), Scalar, P>;
    template <typename Scalar, typename P>
    using Heavy = Branch<hidden_width(config.dim, config.heavy_ff_mult), Scalar, P>;
};

/// RoutedParts, with the names that the reference (the PyTorch package colt5-attention) gives the branches.
template <typename Router, typename Light, typename Heavy>
struct FeedForwardParts {
    static constexpr const char *light_name = "light_ff", *heavy_name = "heavy_ff";

    Router router;
    Light light_ff;
    Heavy heavy_ff;
};

}  // namespace detail

/// Conditional feedforward (CoLT5, section 3.1): a light feedforward for every token, a heavy one for the tokens that
/// the router chooses, weighted by their scores:
///
///     out_i = light(x_i) + score_i · heavy(x_i) [i chosen]
///
/// If the router chooses a token several times, the token gets the mean of score · heavy over these choices.
/// Masked tokens get no heavy output; what is not finite in them counts as 0. The router is that of `router_type`, or
/// any template that meets Router.
template <FeedForwardConfig config, typename Scalar, Policy P,
          template <RouterConfig, typename, typename> class RouterTemplate = ConfiguredRouter>
class ConditionalRoutedFeedForward
    : public Routed<detail::RoutedFeedForward<config>::routed, Scalar, P,
                    typename detail::RoutedFeedForward<config>::template Heavy<Scalar, P>,
                    typename detail::RoutedFeedForward<config>::template Light<Scalar, P>, RouterTemplate,
                    detail::FeedForwardParts> {
public:
    using ConditionalRoutedFeedForward::Routed::Routed;
};

}  // namespace colt5
