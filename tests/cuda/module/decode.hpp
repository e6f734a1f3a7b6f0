// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include <colt5/module/conditional_routed_transformer_block.hpp>
#include <colt5/module/stack.hpp>

#include "../draw.hpp"

/// Cases of decode, of module/module.hpp and of the modules that have it.
namespace cases {

/// Sequences of different lengths, decoded in chunks of random sizes, against the module for each of them alone: the
/// same bits in double and float.
template <typename Module, typename T, typename P>
void record_decode(Recorder<P>& record, Draw<T, P>& draw, const Setting& setting, const std::string& name,
                   Index longest) {
    const P& policy = record.policy;
    const auto module = draw.template made<Module>();
    const Index batch = draw.size(1, 4), dim = Module::model_dim;
    std::vector<Index> lengths;
    for (Index b = 0; b < batch; ++b) lengths.push_back(draw.length(longest));
    const Index length = *std::max_element(lengths.begin(), lengths.end());
    const auto x = draw.tokens(std::array{batch, length, dim});
    const auto all = to_host(policy, x);
    using Values = std::vector<double>;
    Values expected(all.size()), actual(all.size());
    const auto part = [&](const std::vector<Index>& first, const std::vector<Index>& counts, Index width) {
        TokensTensor<T, P> tokens(policy, {static_cast<Index>(counts.size()), width, dim});
        fill_with(policy, tokens, [&](std::size_t i) {
            const auto at = static_cast<Index>(i), b = at / (width * dim), token = at / dim % width;
            const auto of = static_cast<std::size_t>(b);
            return token < counts[of]
                       ? static_cast<double>(
                             all[static_cast<std::size_t>((b * length + first[of] + token) * dim + at % dim)])
                       : std::nan("");
        });
        return tokens;
    };
    const auto put = [&](Values& to, const auto& y, Index b, Index of_y, Index first, Index count) {
        const auto values = to_host(policy, y);
        for (Index i = 0; i < count * dim; ++i)
            to[static_cast<std::size_t>((b * length + first) * dim + i)] =
                static_cast<double>(values[static_cast<std::size_t>(of_y * y.extent(1) * dim + i)]);
    };
    for (Index b = 0; b < batch; ++b) {
        const Index count = lengths[static_cast<std::size_t>(b)];
        TokensTensor<T, P> alone(policy, {1, count, dim});
        fill_with(policy, alone, [&](std::size_t i) {
            return static_cast<double>(all[static_cast<std::size_t>(b * length * dim) + i]);
        });
        put(expected, module(alone), b, 0, 0, count);
    }
    auto cache = module.make_cache(batch, length);
    while (cache.lengths() != lengths) {
        const Index most = draw.chance(0.5) ? draw.size(1, 3) : draw.size(1, longest);
        const auto past = cache.lengths();
        std::vector<Index> counts;
        for (std::size_t b = 0; b < past.size(); ++b)
            counts.push_back(std::min(draw.chance(0.8) ? most : Index{0}, lengths[b] - past[b]));
        const Index width = std::max(Index{1}, *std::max_element(counts.begin(), counts.end()));
        const auto y = module.decode(cache, part(past, counts, width), counts);
        for (std::size_t b = 0; b < past.size(); ++b)
            put(actual, y, static_cast<Index>(b), static_cast<Index>(b), past[b], counts[b]);
    }
    const bool is_exact = setting.precision == Precision::fp64 || setting.precision == Precision::fp32;
    record.holds(name + ": decode = forward", !is_exact || actual == expected);
    double error = 0, norm = 0;
    for (std::size_t i = 0; i < actual.size(); ++i) {
        error += (actual[i] - expected[i]) * (actual[i] - expected[i]);
        norm += expected[i] * expected[i];
    }
    // In 16 bits, rounding can choose another token.
    const bool is_close = std::isfinite(error) && std::sqrt(error) <= 0.3 * std::sqrt(norm);
    record.holds(name + ": decode is close to forward", is_close);
    record.holds(name + ": bytes", cache.bytes() == Module::cache_bytes(batch, length));
}

inline constexpr CausalKwargs decoded_routing{.rate = 0.25, .block_size = 64, .score_scale = 0.2};
inline constexpr FeedForwardConfig decoded_ff{.dim = 64,
                                              .num_heavy_tokens = 100,
                                              .router_straight_through = false,
                                              .router_type = RouterType::causal,
                                              .router_kwargs = {.causal = decoded_routing}};

inline constexpr AttentionConfig decoded_attention{.dim = 48,
                                                   .num_heavy_tokens_q = 300,
                                                   .num_heavy_tokens_kv = 100,
                                                   .num_routed_kv = 2,
                                                   .light_dim_head = 16,
                                                   .light_heads = 2,
                                                   .light_window_size = 100,
                                                   .heavy_dim_head = 32,
                                                   .heavy_heads = 4,
                                                   .router_straight_through = false,
                                                   .router_type = RouterType::causal,
                                                   .router_kwargs = {.causal = decoded_routing},
                                                   .use_null_kv = true,
                                                   .use_null_q_tokens = true,
                                                   .multiply_queries_by_score = true,
                                                   .use_relative_position_bias = true,
                                                   .rotary_emb = true,
                                                   .light_rotary_emb = true};
inline constexpr TransformerBlockConfig decoded_block{.dim = 32,
                                                      .num_heavy_attn_tokens_q = 300,
                                                      .num_heavy_attn_tokens_kv = 300,
                                                      .num_heavy_ff_tokens = 300,
                                                      .light_dim_head = 64,
                                                      .light_heads = 1,
                                                      .light_window_size = 32,
                                                      .heavy_dim_head = 64,
                                                      .heavy_heads = 2,
                                                      .router_type = RouterType::causal,
                                                      .router_kwargs = {.causal = decoded_routing}};

template <typename T, typename P>
Results decode_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    record_decode<ConditionalRoutedFeedForward<decoded_ff, T, P>>(record, draw, setting, "feedforward", 500);
    record_decode<ConditionalRoutedAttention<decoded_attention, T, P>>(record, draw, setting, "attention", 700);
    record_decode<Stack<ConditionalRoutedTransformerBlock<decoded_block, T, P>, 2>>(record, draw, setting, "stack",
                                                                                    500);
    return record.results;
}

}  // namespace cases
