// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/module/conditional_routed_cross_attention.hpp>

#include "../draw.hpp"
#include "record.hpp"

/// Cases of ConditionalRoutedCrossAttention.
namespace cases {

inline constexpr CrossAttentionConfig cross_config{.dim = 48,
                                                   .num_tokens_q = 20,
                                                   .num_tokens_kv = 30,
                                                   .dim_head = 16,
                                                   .heads = 4,
                                                   .router_kwargs = {.coor_descent = {.score_scale = 0.2}},
                                                   .kv_routing_tokens = 2};

inline constexpr CrossAttentionConfig cross_with_null_tokens = [] {
    CrossAttentionConfig config = cross_config;
    config.use_null_kv = config.use_null_q_tokens = config.multiply_keys_by_score = true;
    return config;
}();

inline constexpr CrossAttentionConfig cross_conditioned = [] {
    CrossAttentionConfig config = cross_config;
    config.condition_kv_routing_on_queries = true;
    return config;
}();
inline constexpr CrossAttentionConfig cross_by_softmax = [] {
    CrossAttentionConfig config = cross_config;
    config.router_type = RouterType::cum_softmax;
    return config;
}();
inline constexpr CrossAttentionConfig cross_by_sinkhorn = [] {
    CrossAttentionConfig config = cross_config;
    config.router_type = RouterType::sinkhorn;
    return config;
}();
inline constexpr CrossAttentionConfig cross_in_blocks = [] {
    CrossAttentionConfig config = cross_config;
    config.route_block_size = 50;
    return config;
}();
inline constexpr CrossAttentionConfig cross_conditioned_in_blocks = [] {
    CrossAttentionConfig config = cross_conditioned;
    config.route_block_size = 50;
    return config;
}();
inline constexpr CrossAttentionConfig cross_with_query_routes = [] {
    CrossAttentionConfig config = cross_config;
    config.q_routing_tokens = 4;
    config.use_null_q_tokens = config.use_relative_position_bias = true;
    return config;
}();
inline constexpr CrossAttentionConfig cross_with_bias = [] {
    CrossAttentionConfig config = cross_config;
    config.use_null_kv = config.use_relative_position_bias = true;
    return config;
}();

template <CrossAttentionConfig config, typename T, typename P>
Results cross_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 5), length = draw.length(200), memories = draw.length(2000);
    const auto x = draw.tokens(std::array{batch, length, config.dim});
    const auto context = draw.tokens(std::array{batch, memories, config.dim});
    const auto with_mask = draw.mask(batch, length);
    const auto with_context_mask = draw.mask(batch, memories);
    const bool masked = draw.chance(0.5);
    record_module<config.multiply_keys_by_score ? Kind::amplified : Kind::rounded>(
        record, draw, draw.template made<ConditionalRoutedCrossAttention<config, T, P>>(), x, context,
        masked ? Mask(with_mask.const_view()) : Mask{}, masked ? Mask(with_context_mask.const_view()) : Mask{});
    return record.results;
}

}  // namespace cases
