// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <limits>
#include <string>

#include <colt5/module/conditional_routed_feed_forward.hpp>
#include <colt5/module/heavy_attention.hpp>
#include <colt5/module/routed.hpp>

#include "../draw.hpp"
#include "record.hpp"

/// Cases of Routed with other branches than those of ConditionalRoutedFeedForward.
namespace cases {

/// Attention among the tokens that it is given, as a branch with a mask and without an epilogue.
template <typename T, typename P>
struct AttentionAmong : HeavyAttention<T, P> {
    using Attention = HeavyAttention<T, P>;

    AttentionAmong(const P& policy, SeedSequence& seeds) : Attention(policy, seeds, 48, 2, 16) {}

    typename Attention::Activations forward(const P& policy, TokensView<T> out, TokensView<const T> x, Mask mask,
                                            bool) const {
        auto saved = Attention::forward(policy, x, one_set(x), one_set(mask), {});
        assign(policy, out, as_expression(saved.out));
        return saved;
    }
    void backward(const P& policy, const typename Attention::Activations& saved, TokensView<T> d_x,
                  TokensView<const T> d_out, TokensView<const T> x, Mask mask,
                  typename Attention::Gradients& gradients) const {
        const auto d = Attention::backward(policy, saved, d_out, x, one_set(x), one_set(mask), {}, gradients);
        assign(policy, d_x, d.d_x + d.d_context.view().reshape(x.shape()));
    }

private:
    static View<const T, dynamic, dynamic, dynamic, dynamic> one_set(TokensView<const T> x) {
        return x.reshape(std::array<Index, 4>{x.extent(0), 1, x.extent(1), x.extent(2)});
    }
    static KeyMask one_set(Mask mask) {
        if (!mask) return {};
        return mask.reshape(std::array<Index, 3>{mask.extent(0), 1, mask.extent(1)});
    }
};

constexpr RoutedConfig routed_config(Index routes, bool sequence_order, RouterType router = RouterType::coor_descent) {
    return {.dim = 48,
            .num_heavy_tokens = 17,
            .num_routes = routes,
            .sequence_order = sequence_order,
            .router_straight_through = false,
            .router_type = router,
            .router_kwargs = {.coor_descent = {.score_scale = 0.2}}};
}
inline constexpr RoutedConfig two_routes = routed_config(2, false), two_routes_in_order = routed_config(2, true),
                              one_route = routed_config(1, false),
                              two_routes_by_softmax = routed_config(2, false, RouterType::cum_softmax),
                              two_routes_by_sinkhorn = routed_config(2, false, RouterType::sinkhorn);
inline constexpr FeedForwardConfig routed_again{.dim = 48,
                                                .num_heavy_tokens = 7,
                                                .router_straight_through = false,
                                                .router_kwargs = {.coor_descent = {.score_scale = 0.2}}};

/// Two feedforwards choose their tokens: the gradients of both logits go into the light branch's epilogue.
template <RoutedConfig config, typename T, typename P>
using TwoFeedForwards = Routed<config, T, P, SizedFeedForward<48, 96, T, P>, SizedFeedForward<48, 24, T, P>>;
template <typename T, typename P>
using ExpertChoice = TwoFeedForwards<two_routes, T, P>;
template <typename T, typename P>
using ExpertChoiceBySoftmax = TwoFeedForwards<two_routes_by_softmax, T, P>;
template <typename T, typename P>
using ExpertChoiceBySinkhorn = TwoFeedForwards<two_routes_by_sinkhorn, T, P>;
/// Two attentions, each over tokens of its own, and no light branch.
template <typename T, typename P>
using MixtureOfAttention = Routed<two_routes_in_order, T, P, AttentionAmong<T, P>>;
/// A module with streams of its own as the heavy branch, and a light branch that gets clean tokens.
template <typename T, typename P>
using RoutedTwice =
    Routed<one_route, T, P, AsBranch<ConditionalRoutedFeedForward<routed_again, T, P>>, AttentionAmong<T, P>>;

template <template <typename, typename> class Module, typename T, typename P>
Results routed_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), length = draw.length(500);
    const auto x = draw.tokens(std::array{batch, length, Index{48}});
    const auto mask = draw.optional_mask(batch, length);
    const Residual residual = draw.chance(0.5) ? Residual::tokens : Residual::none;
    const auto module_of_case = draw.template made<Module<T, P>>();
    module_of_case.forward(x, mask).each_router([&](const std::string& name, const auto& view) {
        const auto summary = summarize(policy, view);
        record("live tokens of " + name, summary.live, Kind::exact);
        const auto is_finite = as_expression(summary.thresholds) < std::numeric_limits<accumulate_t<T>>::infinity();
        auto thresholds = tensor_like(policy, summary.thresholds);
        assign(policy, thresholds, select(is_finite, summary.thresholds, accumulate_t<T>(0)));
        record.in_float("thresholds of " + name, thresholds);
    });
    record_module(record, draw, module_of_case, x, mask.const_view(), RoutedCounts{}, residual);
    return record.results;
}

}  // namespace cases
