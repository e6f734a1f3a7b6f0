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
    const auto x = draw.values(std::array{batch, windows * window, dim});
    const auto rows = look_back(policy, x, window);
    record("rows", rows);
    record("d_x", look_back_vjp(policy, draw.values(rows.shape()), windows * window, window));
    record("counts", look_back_counts(policy, batch, windows, window));
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
    const auto x = draw.values(std::array{draw.size(1, 5), draw.length(700), config.dim});
    record_module(record, draw, draw.template made<ConditionalRoutedAutoregressiveAttention<config, T, P>>(), x);
    return record.results;
}

}  // namespace cases
