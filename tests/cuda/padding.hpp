// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <colt5/cuda.cuh>

#include <limits>
#include <string>
#include <vector>

/// What padding holds, finite or not, is not seen: not by real tokens, and not by any gradient.
namespace cases {

using namespace colt5;

template <Viewable V>
std::vector<double> numbers_of(const Cuda& policy, const V& tensor) {
    std::vector<double> numbers;
    for (const auto x : to_host(policy, tensor)) numbers.push_back(static_cast<double>(static_cast<float>(x)));
    return numbers;
}

/// What a call gives: outputs of real tokens, then gradients of tokens and of parameters.
template <typename Module, typename Gradients, typename T, typename... D>
std::vector<std::vector<double>> results(const Cuda& policy, const TokensTensor<T, Cuda>& out, Mask mask,
                                         const Gradients& gradients, const D&... d_tokens) {
    auto real = tensor_like(policy, out);
    assign(policy, real, select(column(mask), out, 0.0f));
    std::vector<std::vector<double>> all{numbers_of(policy, real), numbers_of(policy, d_tokens)...};
    Module::each_parameter([&](const std::string&, const auto& g) { all.push_back(numbers_of(policy, g)); }, "",
                           gradients);
    return all;
}

/// Tokens (2, length, dim) whose padding holds `value`.
template <typename T>
TokensTensor<T, Cuda> tokens_with_padding(const Cuda& policy, Index length, Index dim, int stream, Mask mask,
                                          float value) {
    TokensTensor<T, Cuda> tokens(policy, {2, length, dim});
    fill_normal(policy, tokens, Random(Seed{7}, static_cast<std::uint64_t>(stream)));
    assign(policy, tokens, select(column(mask), tokens, value));
    return tokens;
}

/// Real tokens here and there in the first sequence, and three in the second.
inline MatrixTensor<bool, Cuda> mask_of(const Cuda& policy, Index length) {
    MatrixTensor<bool, Cuda> mask(policy, {2, length});
    fill_with(policy, mask, [&](std::size_t i) {
        const auto at = static_cast<Index>(i);
        return at < length ? at % 5 != 3 && at % 64 < 50 : at < length + 3;
    });
    return mask;
}

template <typename Run>
void check_poisons(const Run& run) {
    using limits = std::numeric_limits<float>;
    const auto expected = run(0.0f);
    for (const float poison : {limits::quiet_NaN(), limits::infinity(), -limits::infinity(), 3e38f}) {
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
void check_padding_of(const Cuda& policy, Index length, Index dim) {
    const auto mask = mask_of(policy, length);
    check_poisons([&](float padding) {
        const Module module(policy, Seed{1});  // routers begin their noise again
        const auto x = tokens_with_padding<T>(policy, length, dim, 0, mask, padding);
        const auto d_out = tokens_with_padding<T>(policy, length, dim, 1, mask, 0);
        auto gradients = module.make_gradients();
        const auto pass = module.forward(x, mask);
        const auto d_x = module.backward(pass, d_out, gradients);
        auto all = results<Module>(policy, pass.out, mask, gradients, d_x);
        all.push_back(results<Module>(policy, module(x, mask), mask, gradients).front());
        return all;
    });
}

template <RouterType router>
inline constexpr TransformerBlockConfig padded_block{.dim = 64,
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
                                                     .router_kwargs = {.coor_descent = {.score_scale = 0.125}}};
inline constexpr CrossAttentionConfig padded_cross{
    .dim = 64, .num_tokens_q = 40, .num_tokens_kv = 50, .dim_head = 16, .heads = 4};

template <typename T, RouterType router>
void check_padding_with() {
    CAPTURE(static_cast<int>(router));
    using Block = ConditionalRoutedTransformerBlock<padded_block<router>, T, Cuda>;
    const Cuda policy;
    for (const Index length : {40, 300}) {
        CAPTURE(length);
        check_padding_of<Block, T>(policy, length, 64);
        check_padding_of<typename Block::Attention, T>(policy, length, 64);
        check_padding_of<typename Block::FeedForward, T>(policy, length, 64);
    }
}

template <typename T>
void check_padding() {
    check_padding_with<T, RouterType::coor_descent>();
    check_padding_with<T, RouterType::cum_softmax>();
    check_padding_with<T, RouterType::sinkhorn>();
    using Cross = ConditionalRoutedCrossAttention<padded_cross, T, Cuda>;
    const Cuda policy;
    for (const Index queries : {30, 100})  // routed, or not
        for (const Index keys : {30, 100}) {
            CAPTURE(queries);
            CAPTURE(keys);
            const auto mask = mask_of(policy, queries), context_mask = mask_of(policy, keys);
            check_poisons([&](float padding) {
                const Cross cross(policy, Seed{1});
                const auto x = tokens_with_padding<T>(policy, queries, 64, 0, mask, padding);
                const auto context = tokens_with_padding<T>(policy, keys, 64, 1, context_mask, padding);
                const auto d_out = tokens_with_padding<T>(policy, queries, 64, 2, mask, 0);
                auto gradients = cross.make_gradients();
                const auto pass = cross.forward(x, context, mask, context_mask);
                const auto d = cross.backward(pass, d_out, gradients);
                return results<Cross>(policy, pass.out, mask, gradients, d.d_x, d.d_context);
            });
        }
}

}  // namespace cases
