// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <colt5/cuda.cuh>

#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "../module/block.hpp"
#include "../module/cross_attention.hpp"
#include "../module/image.hpp"
#include "../module/routed.hpp"
#include "numbers.hpp"
#include "padded_tokens.hpp"

/// What padding holds, finite or not, changes no output of real tokens and no gradient.
namespace cases {

using namespace colt5;

/// What a call gives: outputs of real tokens, then gradients of tokens and of parameters.
template <typename Module, typename Gradients, typename T, typename... D>
std::vector<std::vector<double>> results(const Cuda& policy, const TokensTensor<T, Cuda>& out, Mask mask,
                                         const Gradients& gradients, const D&... d_tokens) {
    auto real = tensor_like(policy, out);
    assign(policy, real, select(column(mask), out, 0.0f));
    std::vector<std::vector<double>> all{numbers(policy, real), numbers(policy, d_tokens)...};
    Module::each_parameter([&](const std::string&, const auto& g) { all.push_back(numbers(policy, g)); }, "",
                           gradients);
    return all;
}

template <typename Run>
void check_poisons(const Run& run, bool finite_too = true) {
    using limits = std::numeric_limits<float>;
    const auto expected = run(0.0f);
    for (const float poison : {limits::quiet_NaN(), limits::infinity(), -limits::infinity(), 3e38f}) {
        if (std::isfinite(poison) && !finite_too) continue;
        CAPTURE(poison);
        const auto actual = run(poison);
        REQUIRE(actual.size() == expected.size());
        for (std::size_t i = 0; i < expected.size(); ++i) {
            CAPTURE(i);  // outputs, gradients of tokens, of parameters
            CHECK(actual[i] == expected[i]);
        }
    }
}

template <typename Module, typename T>
void check_padding_of(const Cuda& policy, Index length, Index dim, bool finite_too = true) {
    const auto mask = mask_of(policy, length);
    const auto run = [&](float padding) {
        const Module module(policy, Seed{1});  // a new module, so that its routers draw the same noise
        const auto x = tokens_with_padding<T>(policy, length, dim, 0, mask, padding);
        const auto d_out = tokens_with_padding<T>(policy, length, dim, 1, mask, 0);
        auto gradients = module.make_gradients();
        const auto saved = module.forward(x, mask);
        const auto d_x = module.backward(saved, d_out, gradients);
        auto all = results<Module>(policy, saved.out, mask, gradients, d_x);
        all.push_back(results<Module>(policy, module(x, mask), mask, gradients).front());
        return all;
    };
    check_poisons(run, finite_too);
}

/// Maps of the tokens (2, height · width, 48), row by row, whose channels come first if the module wants that.
template <bool channel_first, typename T>
MapTensor<T, Cuda> maps_of(const Cuda& policy, const TokensTensor<T, Cuda>& tokens, Index height) {
    const Index count = tokens.extent(1), dim = tokens.extent(2), width = count / height;
    MapTensor<T, Cuda> maps(
        policy, channel_first ? std::array{Index{2}, dim, height, width} : std::array{Index{2}, height, width, dim});
    const auto values = to_host(policy, tokens);
    fill_with(policy, maps, [&](std::size_t i) {
        if constexpr (!channel_first) return values[i];
        const auto at = static_cast<Index>(i), b = at / (dim * count), c = at / count % dim, token = at % count;
        return values[static_cast<std::size_t>((b * count + token) * dim + c)];
    });
    return maps;
}

template <ImageAttentionConfig config, typename T>
void check_padding_of_maps(const Cuda& policy, Index height, Index width) {
    using Module = ConditionalRoutedImageAttention<config, T, Cuda>;
    const Index tokens = height * width;
    const auto mask = mask_of(policy, tokens);
    const MapMask of_map = mask.const_view().reshape(std::array{Index{2}, height, width});
    const auto is_real = to_host(policy, mask);
    check_poisons([&](float padding) {
        const Module module(policy, Seed{1});
        const auto maps_with = [&](int stream, float value) {
            return maps_of<config.channel_first>(
                policy, tokens_with_padding<T>(policy, tokens, config.dim, stream, mask, value), height);
        };
        const auto maps = maps_with(0, padding), d_out = maps_with(1, 0);
        auto gradients = module.make_gradients();
        const auto saved = module.forward(maps, of_map);
        const auto d_maps = module.backward(saved, d_out, gradients);
        auto real = numbers(policy, saved.out);
        for (std::size_t i = 0; i < real.size(); ++i) {
            const auto at = static_cast<Index>(i);
            const Index token =
                config.channel_first ? at / (config.dim * tokens) * tokens + at % tokens : at / config.dim;
            if (!is_real[static_cast<std::size_t>(token)]) real[i] = 0;
        }
        std::vector<std::vector<double>> all{real, numbers(policy, d_maps)};
        Module::each_parameter([&](const std::string&, const auto& g) { all.push_back(numbers(policy, g)); }, "",
                               gradients);
        return all;
    });
}

/// How much padding there is changes no choice in blocks either: another choice would change outputs by much more.
template <typename Module, typename T>
void check_amount_of_padding(const Cuda& policy, double tolerance = 0.03) {
    constexpr Index length = 170, padded_length = 311, dim = 48;
    const Module module(policy, Seed{1});
    TokensTensor<T, Cuda> x(policy, {1, length, dim}), d_out(policy, {1, length, dim});
    fill_normal(policy, x, Random(Seed{2}));
    fill_normal(policy, d_out, Random(Seed{3}));
    const auto with_padding = [&](const TokensTensor<T, Cuda>& of) {
        const auto values = to_host(policy, of);
        TokensTensor<T, Cuda> padded(policy, {1, padded_length, dim});
        fill_with(policy, padded, [&](std::size_t i) { return i < values.size() ? values[i] : static_cast<T>(0.0f); });
        return padded;
    };
    const auto padded = with_padding(x), d_padded = with_padding(d_out);
    MatrixTensor<bool, Cuda> mask(policy, {1, padded_length});
    fill_with(policy, mask, [&](std::size_t i) { return static_cast<Index>(i) < length; });
    without_noise(module, [&] {
        auto gradients = module.make_gradients();
        const auto alone = module.forward(x);
        const auto saved = module.forward(padded, mask);
        const auto d_alone = module.backward(alone, d_out, gradients), d = module.backward(saved, d_padded, gradients);
        CHECK(largest_error(numbers(policy, saved.out.const_view().rows().range(0, length)),
                            numbers(policy, alone.out)) <= tolerance);
        CHECK(largest_error(numbers(policy, d.const_view().rows().range(0, length)), numbers(policy, d_alone)) <=
              tolerance);
    });
}

template <RouterType router, bool take_part>
inline constexpr TransformerBlockConfig padded_block{
    .dim = 64,
    .num_heavy_attn_tokens_q = 16,
    .num_heavy_attn_tokens_kv = 24,
    .num_routed_kv = 1 + static_cast<Index>(router),
    .num_heavy_ff_tokens = 16,
    .light_dim_head = 16,
    .light_heads = 4,
    .light_window_size = 32,
    .heavy_dim_head = 16,
    .heavy_heads = 6,
    .router_straight_through = false,
    .router_type = router,
    .router_kwargs = {.coor_descent = {.score_scale = 0.125}, .sinkhorn = {.masked_tokens_take_part = take_part}}};
/// What one kernel of compute capability 9.0a takes in 16 bits.
inline constexpr FeedForwardConfig padded_wide{.dim = 512, .num_heavy_tokens = 16, .light_ff_mult = 0.5};
inline constexpr FeedForwardConfig padded_gated{
    .dim = 64, .num_heavy_tokens = 16, .feed_forward = FeedForwardType::gated, .router_straight_through = false};
inline constexpr CrossAttentionConfig padded_cross{
    .dim = 64, .num_tokens_q = 40, .num_tokens_kv = 50, .dim_head = 16, .heads = 4};

template <typename T, RouterType router, bool take_part = false>
void check_padding_with() {
    CAPTURE(static_cast<int>(router));
    using Block = ConditionalRoutedTransformerBlock<padded_block<router, take_part>, T, Cuda>;
    const Cuda policy;
    for (const Index length : {40, 300}) {
        CAPTURE(length);
        // Numbers in padding count where the router reads it, and so does what a first half makes of them.
        if (!take_part) check_padding_of<Block, T>(policy, length, 64);
        check_padding_of<typename Block::Attention, T>(policy, length, 64, !take_part);
        check_padding_of<typename Block::FeedForward, T>(policy, length, 64, !take_part);
    }
}

template <CrossAttentionConfig config, typename T>
void check_padding_of_cross(const Cuda& policy) {
    using Cross = ConditionalRoutedCrossAttention<config, T, Cuda>;
    for (const Index queries : {15, 100})  // routed, or not
        for (const Index keys : {25, 100}) {
            CAPTURE(queries);
            CAPTURE(keys);
            const auto mask = mask_of(policy, queries), context_mask = mask_of(policy, keys);
            check_poisons([&](float padding) {
                const Cross cross(policy, Seed{1});
                const auto x = tokens_with_padding<T>(policy, queries, config.dim, 0, mask, padding);
                const auto context = tokens_with_padding<T>(policy, keys, config.dim, 1, context_mask, padding);
                const auto d_out = tokens_with_padding<T>(policy, queries, config.dim, 2, mask, 0);
                auto gradients = cross.make_gradients();
                const auto saved = cross.forward(x, context, mask, context_mask);
                const auto d = cross.backward(saved, d_out, gradients);
                return results<Cross>(policy, saved.out, mask, gradients, d.d_x, d.d_context);
            });
        }
}

template <typename T>
void check_padding() {
    check_padding_with<T, RouterType::coor_descent>();
    check_padding_with<T, RouterType::cum_softmax>();
    check_padding_with<T, RouterType::sinkhorn>();
    check_padding_with<T, RouterType::sinkhorn, true>();
    const Cuda policy;
    check_padding_of<ConditionalRoutedFeedForward<padded_wide, T, Cuda>, T>(policy, 300, 512);
    check_padding_of<ConditionalRoutedFeedForward<padded_gated, T, Cuda>, T>(policy, 300, 64);
    for (const Index length : {10, 300}) {
        CAPTURE(length);
        check_padding_of<ExpertChoice<T, Cuda>, T>(policy, length, 48);
        check_padding_of<MixtureOfAttention<T, Cuda>, T>(policy, length, 48);
        check_padding_of<RoutedTwice<T, Cuda>, T>(policy, length, 48);
        const auto check_attention = [&]<AttentionConfig config>() {
            check_padding_of<ConditionalRoutedAttention<config, T, Cuda>, T>(policy, length, 48);
        };
        check_attention.template operator()<attention_with_null_tokens>();
        check_attention.template operator()<heavy_attention_alone>();
        check_attention.template operator()<attention_with_rotary>();
        check_attention.template operator()<attention_with_bias>();
        check_attention.template operator()<attention_with_query_routes>();
        check_attention.template operator()<query_routes_by_softmax>();
        check_attention.template operator()<query_routes_by_sinkhorn>();
        check_attention.template operator()<query_routes_with_bias>();
        const auto check_block = [&]<TransformerBlockConfig config>() {
            check_padding_of<ConditionalRoutedTransformerBlock<config, T, Cuda>, T>(policy, length, 48);
        };
        check_block.template operator()<of_paper>();
        check_block.template operator()<by_descent_in_blocks>();
        check_block.template operator()<by_softmax_in_blocks>();
        check_block.template operator()<by_sinkhorn_in_blocks>();
    }
    const auto check_amount = [&]<TransformerBlockConfig config>() {
        using Block = ConditionalRoutedTransformerBlock<config, T, Cuda>;
        check_amount_of_padding<typename Block::Attention, T>(policy);
        check_amount_of_padding<typename Block::FeedForward, T>(policy);
    };
    check_amount.template operator()<by_descent_in_blocks>();
    check_amount.template operator()<by_softmax_in_blocks>();
    check_amount.template operator()<by_sinkhorn_in_blocks>();
    for (const Index height : {3, 20}) {
        CAPTURE(height);
        check_padding_of_maps<over_map, T>(policy, height, 17);
        check_padding_of_maps<over_map_of_channels, T>(policy, height, 17);
        check_padding_of_maps<per_window, T>(policy, height, 17);
    }
    check_padding_of_cross<padded_cross, T>(policy);
    check_padding_of_cross<cross_with_query_routes, T>(policy);
    check_padding_of_cross<cross_with_bias, T>(policy);
    check_padding_of_cross<cross_with_null_tokens, T>(policy);
    check_padding_of_cross<cross_conditioned, T>(policy);
    check_padding_of_cross<cross_in_blocks, T>(policy);
    check_padding_of_cross<cross_conditioned_in_blocks, T>(policy);
}

}  // namespace cases
