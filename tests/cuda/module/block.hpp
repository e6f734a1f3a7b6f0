// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <string>

#include <colt5/module/conditional_routed_transformer_block.hpp>

#include "../draw.hpp"
#include "record.hpp"

/// Cases of a block and of its halves, ConditionalRoutedAttention and ConditionalRoutedFeedForward.
namespace cases {

constexpr TransformerBlockConfig block_config(RouterType router, Index routes = 2) {
    return {.dim = 48,
            .num_heavy_attn_tokens_q = 12,
            .num_heavy_attn_tokens_kv = 20,
            .num_routed_kv = routes,
            .num_heavy_ff_tokens = 17,
            .light_dim_head = 16,
            .light_heads = 3,
            .light_window_size = 30,
            .heavy_dim_head = 32,
            .heavy_heads = 4,
            .router_straight_through = false,
            .router_type = router,
            .router_kwargs = {.coor_descent = {.score_scale = 0.2}, .cum_softmax = {.temperature = 4}}};
}
inline constexpr TransformerBlockConfig by_descent = block_config(RouterType::coor_descent),
                                        by_descent_of_one_route = block_config(RouterType::coor_descent, 1),
                                        by_softmax = block_config(RouterType::cum_softmax),
                                        by_sinkhorn = block_config(RouterType::sinkhorn);

/// The paper's form, which module/paper.hpp has at the paper's sizes.
inline constexpr TransformerBlockConfig of_paper = [] {
    TransformerBlockConfig config = by_descent_of_one_route;
    config.feed_forward = FeedForwardType::gated;
    config.multiply_keys_by_score = config.use_relative_position_bias = true;
    return config;
}();

/// The same with routing in blocks of the sequence.
constexpr TransformerBlockConfig in_blocks(TransformerBlockConfig config) {
    config.router_kwargs.route_block_size = 50;
    return config;
}
inline constexpr TransformerBlockConfig by_descent_in_blocks = in_blocks(by_descent),
                                        by_softmax_in_blocks = in_blocks(by_softmax),
                                        by_sinkhorn_in_blocks = in_blocks(by_sinkhorn);

/// Tokens and perhaps a mask.
template <TransformerBlockConfig config, typename T, typename P>
struct BlockInput {
    explicit BlockInput(Draw<T, P>& draw)
        : batch(draw.size(1, 9)),
          length(draw.length(500)),
          x(draw.tokens(std::array{batch, length, config.dim})),
          with_mask(draw.optional_mask(batch, length)),
          mask(with_mask.const_view()) {}
    Index batch, length;
    TokensTensor<T, P> x;
    Tensor<bool, P, dynamic, dynamic> with_mask;
    Mask mask;
};

/// Each half of the block on its own: what it routes by is the same number on either side, whatever the precision.
template <TransformerBlockConfig config, typename T, typename P>
Results half_block_case(const P& policy, const Setting& setting) {
    using Block = ConditionalRoutedTransformerBlock<config, T, P>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const BlockInput<config, T, P> in(draw);
    const Residual residual = draw.chance(0.5) ? Residual::tokens : Residual::none;
    if (setting.seed % 2 == 0)
        record_module(record, draw, draw.template made<typename Block::Attention>(), in.x, in.mask, AttentionCounts{},
                      residual);
    else
        record_module(record, draw, draw.template made<typename Block::FeedForward>(), in.x, in.mask,
                      FeedForwardCounts{}, residual);
    return record.results;
}

/// The block is its two halves, bit for bit. Where numbers are rounded less than in float, this is all that can be said
/// of it: its feedforward routes by what its attention computed, and may choose another token.
template <TransformerBlockConfig config, typename T, typename P>
Results block_case(const P& policy, const Setting& setting) {
    using Block = ConditionalRoutedTransformerBlock<config, T, P>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const BlockInput<config, T, P> in(draw);
    const auto d_out = draw.values(in.x.shape());

    const Block block = draw.template made<Block>();
    auto gradients = block.make_gradients();
    const auto saved = block.forward(in.x, in.mask);
    const auto d_x = block.backward(saved, d_out, gradients);

    const Block parts = draw.template made<Block>();  // another one, since Sinkhorn draws noise at every call
    auto gradients_of_parts = parts.make_gradients();
    const auto attention = parts.conditional_attn.forward(in.x, in.mask, {}, Residual::tokens);
    const auto feed_forward = parts.conditional_ff.forward(attention.out, in.mask, {}, Residual::tokens);
    const auto d_middle = parts.conditional_ff.backward(feed_forward, d_out, gradients_of_parts.conditional_ff);
    const auto d_x_of_parts = parts.conditional_attn.backward(attention, d_middle, gradients_of_parts.conditional_attn);

    record.holds("out is that of the parts", same_bits(policy, saved.out, feed_forward.out));
    record.holds("d_tokens is that of the parts", same_bits(policy, d_x, d_x_of_parts));
    Block::each_parameter(
        [&](const std::string& name, const auto& a, const auto& b) {
            record.holds("gradient of " + name + " is that of the parts", same_bits(policy, a, b));
        },
        "", gradients, gradients_of_parts);
    if (setting.precision == Precision::fp64 || setting.precision == Precision::fp32)
        record_module(record, draw, draw.template made<Block>(), in.x, in.mask);
    return record.results;
}

/// Gated feedforwards as light and heavy branch, and one alone.
inline constexpr FeedForwardConfig gated_config{.dim = 48,
                                                .num_heavy_tokens = 17,
                                                .feed_forward = FeedForwardType::gated,
                                                .router_straight_through = false,
                                                .router_kwargs = {.coor_descent = {.score_scale = 0.2}}};

template <typename T, typename P>
Results gated_feed_forward_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    using Module = ConditionalRoutedFeedForward<gated_config, T, P>;
    const Index batch = draw.size(1, 9), length = draw.length(500);
    const auto x = draw.tokens(std::array{batch, length, gated_config.dim});
    const auto mask = draw.optional_mask(batch, length);
    const Residual residual = draw.chance(0.5) ? Residual::tokens : Residual::none;
    const Module routed = draw.template made<Module>();
    record_module(record, draw, routed, x, mask.const_view(), FeedForwardCounts{}, residual);

    using Gated = decltype(routed.light_ff);
    const auto d_out = draw.values(x.shape());
    auto out = tensor_like(policy, x), d_x = tensor_like(policy, x);
    for (const bool save : {false, true}) {
        const std::string name = save ? "alone, saved: " : "alone, recomputed: ";
        const auto saved = routed.light_ff.forward(policy, out.view(), x, save);
        typename Gated::Gradients gradients = zeros_like_parameters(policy, routed.light_ff);
        routed.light_ff.backward(policy, saved, d_x.view(), d_out, x, gradients);
        record(name + "out", out);
        record(name + "d_x", d_x);
        Gated::each_parameter([&](const std::string& parameter,
                                  const auto& gradient) { record(name + "gradient of " + parameter, gradient); },
                              "", gradients);
    }
    return record.results;
}

/// Attention with all that it can learn beside the scores, with and without its light branch.
constexpr AttentionConfig with_null_tokens(bool has_light_attn) {
    return {.dim = 48,
            .num_heavy_tokens_q = 12,
            .num_heavy_tokens_kv = 20,
            .num_routed_kv = 2,
            .light_dim_head = 16,
            .light_heads = 3,
            .light_window_size = 30,
            .heavy_dim_head = 32,
            .heavy_heads = 4,
            .router_straight_through = false,
            .router_kwargs = {.coor_descent = {.score_scale = 0.2}},
            .has_light_attn = has_light_attn,
            .use_null_kv = true,
            .use_null_q_tokens = true,
            .multiply_keys_by_score = true,
            .multiply_queries_by_score = true};
}
inline constexpr AttentionConfig attention_with_null_tokens = with_null_tokens(true),
                                 heavy_attention_alone = with_null_tokens(false);
/// The same, and queries and keys know their positions.
inline constexpr AttentionConfig attention_with_rotary = [] {
    AttentionConfig config = with_null_tokens(true);
    config.rotary_emb = config.light_rotary_emb = true;
    return config;
}();
inline constexpr AttentionConfig attention_with_bias = [] {
    AttentionConfig config = attention_with_null_tokens;
    config.use_null_q_tokens = config.multiply_keys_by_score = config.multiply_queries_by_score = false;
    config.use_relative_position_bias = true;
    return config;
}();

/// As many routes of queries as heads, or as keys have, or fewer.
constexpr AttentionConfig with_query_routes(RouterType router, Index num_routed_q) {
    AttentionConfig config = with_null_tokens(true);
    config.num_routed_q = num_routed_q;
    config.router_type = router;
    config.router_kwargs.cum_softmax.temperature = 4;
    return config;
}
inline constexpr AttentionConfig attention_with_query_routes = with_query_routes(RouterType::coor_descent, 4),
                                 query_routes_by_softmax = with_query_routes(RouterType::cum_softmax, 2);
/// Picks repeat. The positions and their bias are those of each route.
inline constexpr AttentionConfig query_routes_by_sinkhorn = [] {
    AttentionConfig config = with_query_routes(RouterType::sinkhorn, 2);
    config.num_routed_kv = 1;
    config.multiply_keys_by_score = config.multiply_queries_by_score = false;
    config.rotary_emb = config.use_relative_position_bias = true;
    return config;
}();
inline constexpr AttentionConfig query_routes_with_bias = [] {
    AttentionConfig config = attention_with_bias;
    config.num_routed_q = 4;
    config.rotary_emb = true;
    return config;
}();

/// Strictly causal: plain and with all options.
inline constexpr RouterKwargs causal_kwargs{.causal = {.rate = 0.25, .block_size = 32, .score_scale = 0.2}};
inline constexpr AttentionConfig causal_attention = [] {
    AttentionConfig config = with_null_tokens(true);
    config.use_null_kv = config.use_null_q_tokens = false;
    config.multiply_keys_by_score = config.multiply_queries_by_score = false;
    config.num_heavy_tokens_q = config.num_heavy_tokens_kv = 200;
    config.router_type = RouterType::causal;
    config.router_kwargs = causal_kwargs;
    return config;
}();
inline constexpr AttentionConfig causal_attention_with_all = [] {
    AttentionConfig config = with_null_tokens(true);
    config.num_routed_q = 4;
    config.num_heavy_tokens_q = config.num_heavy_tokens_kv = 200;
    config.router_type = RouterType::causal;
    config.router_kwargs = causal_kwargs;
    config.rotary_emb = config.light_rotary_emb = config.use_relative_position_bias = true;
    return config;
}();
inline constexpr TransformerBlockConfig causal_block = [] {
    TransformerBlockConfig config = block_config(RouterType::causal, 1);
    config.num_heavy_attn_tokens_q = config.num_heavy_attn_tokens_kv = config.num_heavy_ff_tokens = 200;
    config.router_kwargs = causal_kwargs;
    return config;
}();

/// Later tokens change no bit of an output.
template <TransformerBlockConfig config, typename T, typename P>
Results another_future_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const BlockInput<config, T, P> in(draw);
    const auto other = draw.values(in.x.shape());
    const auto block = draw.template made<ConditionalRoutedTransformerBlock<config, T, P>>();
    const auto out = to_host(policy, block(in.x, in.mask));
    const auto first = to_host(policy, in.x), second = to_host(policy, other);
    bool same = true;
    for (const Index from : {Index{1}, in.length / 2, in.length - 1}) {
        const auto is_before = [&](std::size_t i) { return static_cast<Index>(i) / config.dim % in.length < from; };
        auto x = tensor_like(policy, in.x);
        fill_with(policy, x, [&](std::size_t i) { return static_cast<double>(is_before(i) ? first[i] : second[i]); });
        const auto moved = to_host(policy, block(x, in.mask));
        for (std::size_t i = 0; i < out.size(); ++i)
            same = same && (!is_before(i) || static_cast<double>(moved[i]) == static_cast<double>(out[i]));
    }
    record.holds("the same bits whatever follows", same);
    return record.results;
}

template <AttentionConfig config, typename T, typename P>
Results attention_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), length = draw.length(500);
    const auto x = draw.tokens(std::array{batch, length, config.dim});
    const auto mask = draw.optional_mask(batch, length);
    const Residual residual = draw.chance(0.5) ? Residual::tokens : Residual::none;
    record_module<Kind::amplified>(record, draw, draw.template made<ConditionalRoutedAttention<config, T, P>>(), x,
                                   mask.const_view(), AttentionCounts{}, residual);
    return record.results;
}

}  // namespace cases
