// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/module/conditional_routed_autoregressive_attention.hpp>

#include "../draw.hpp"
#include "record.hpp"

/// Cases of op/look_back.hpp and ConditionalRoutedAutoregressiveAttention.
namespace cases {

template <typename T, typename P>
Results look_back_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 5), windows = draw.size(1, 20), window = draw.size(1, 60);
    const Index dim = draw.dim_head();
    const auto x = draw.tokens(std::array{batch, windows * window, dim});
    const auto looked_back = look_back(policy, x, window);
    record("rows", looked_back);
    record("d_x", look_back_vjp(policy, draw.values(looked_back.shape()), windows * window, window));
    record("counts", look_back_counts(policy, batch, windows, window));
    const auto logits = draw.sums(std::array{batch, windows * window});
    const Index first = draw.size(0, batch * windows - 1);
    const auto prefixes = window_prefixes(policy, logits, window, first, draw.size(1, batch * windows - first));
    record.in_float("logits of prefixes", prefixes.logits);
    record("prefixes", prefixes.mask);
    auto d_logits = draw.sums(logits.shape());
    window_prefixes_vjp<P, accumulate_t<T>>(policy, d_logits.view(), draw.sums(prefixes.logits.shape()).const_view(),
                                            window, first);
    record.in_float("d_logits of prefixes", d_logits);
    const Index some = prefixes.mask.extent(0), k = draw.size(1, 40);
    const auto picks = draw.indices(some, k, windows * window);
    const auto scores = draw.sums(std::array{some, Index{1}, k});
    const auto keys = window_keys<P, accumulate_t<T>>(policy, picks.const_view().reshape(std::array{some, Index{1}, k}),
                                                      scores.const_view(), windows, window, first, windows * window);
    record("indices of keys", keys.indices);
    record("mask of keys", keys.mask);
    record.in_float("scores of keys", keys.scores);
    record.in_float("d_scores of keys",
                    window_keys_vjp<P, accumulate_t<T>>(policy, draw.sums(keys.scores.shape()).const_view()));
    return record.results;
}

constexpr AutoregressiveAttentionConfig autoregressive_config(Index routes, bool rotary) {
    return {.dim = 48,
            .num_heavy_tokens_q = 6,
            .num_heavy_tokens_kv = 20,
            .num_routed_kv = routes,
            .light_dim_head = 16,
            .light_heads = 3,
            .light_window_size = 8,
            .heavy_window_size = 16,
            .heavy_dim_head = 32,
            .heavy_heads = 4,
            .router_straight_through = false,
            .router_kwargs = {.coor_descent = {.score_scale = 0.2}},
            .use_null_q_tokens = true,
            .rotary_emb = rotary};
}
inline constexpr AutoregressiveAttentionConfig autoregressive = autoregressive_config(1, false),
                                               autoregressive_of_routes = autoregressive_config(2, true);

template <AutoregressiveAttentionConfig config, typename T, typename P>
Results autoregressive_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const auto x = draw.tokens(std::array{draw.size(1, 5), draw.length(700), config.dim});
    record_module(record, draw, draw.template made<ConditionalRoutedAutoregressiveAttention<config, T, P>>(), x);
    return record.results;
}

}  // namespace cases
