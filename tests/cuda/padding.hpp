// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <colt5/cuda.cuh>

#include <algorithm>
#include <array>
#include <cmath>
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
        const Module module(policy, Seed{1});  // routers begin their noise again
        const auto x = tokens_with_padding<T>(policy, length, dim, 0, mask, padding);
        const auto d_out = tokens_with_padding<T>(policy, length, dim, 1, mask, 0);
        auto gradients = module.make_gradients();
        const auto pass = module.forward(x, mask);
        const auto d_x = module.backward(pass, d_out, gradients);
        auto all = results<Module>(policy, pass.out, mask, gradients, d_x);
        all.push_back(results<Module>(policy, module(x, mask), mask, gradients).front());
        return all;
    };
    check_poisons(run, finite_too);
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

template <typename T>
void check_padding() {
    check_padding_with<T, RouterType::coor_descent>();
    check_padding_with<T, RouterType::cum_softmax>();
    check_padding_with<T, RouterType::sinkhorn>();
    check_padding_with<T, RouterType::sinkhorn, true>();
    using Cross = ConditionalRoutedCrossAttention<padded_cross, T, Cuda>;
    const Cuda policy;
    check_padding_of<ConditionalRoutedFeedForward<padded_wide, T, Cuda>, T>(policy, 300, 512);
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

/// Outputs and gradients of local attention (2, length, 2, dim_head), or of dense attention with scores, whose masked
/// keys and values hold `padding`, and whose token `at`, if there is one, is NaN.
template <typename T>
std::vector<std::vector<double>> attend(const Cuda& policy, Index reach, Index length, Index dim_head, Mask mask,
                                        float padding, Index at = -1) {
    auto q = tokens_with_padding<T>(policy, length, 2 * dim_head, 3, mask, 1);
    auto kv = tokens_with_padding<T>(policy, length, 4 * dim_head, 4, mask, padding);
    auto d_out = tokens_with_padding<T>(policy, length, 2 * dim_head, 5, mask, 0.5f);
    if (at >= 0)
        for (auto* const tensor : {&q, &kv, &d_out})
            assign(policy, tensor->view()[0].range(at, 1), std::numeric_limits<float>::quiet_NaN());
    const auto split = [&](auto& tensor) {
        return tensor.view().reshape(std::array<Index, 4>{2, length, 2, dim_head});
    };
    if (reach > 0) {
        const auto of_kv = kv.view().reshape(std::array<Index, 5>{2, length, 2, 2, dim_head});
        const LocalAttention attention{reach};
        const auto pass = local_attention_forward(policy, attention, split(q), of_kv, mask);
        const auto d = local_attention_vjp(policy, attention, pass, split(d_out), split(q), of_kv, mask);
        std::vector<std::vector<double>> all{numbers_of(policy, pass.out), {}, {}};
        const auto numbers = numbers_of(policy, d);
        for (std::size_t i = 0; i < numbers.size(); ++i)  // d_q, then d_k and d_v
            all[static_cast<Index>(i) / (2 * dim_head) % 3 == 0 ? 1 : 2].push_back(numbers[i]);
        return all;
    }
    TokensTensor<accumulate_t<T>, Cuda> scores(policy, {2, 1, length});
    fill_normal(policy, scores, Random(Seed{8}));
    const auto of_kv = kv.view().reshape(std::array<Index, 6>{2, 1, length, 2, 2, dim_head});
    const KeyMask key_mask = mask.reshape(std::array<Index, 3>{2, 1, length});
    const auto pass = dense_attention_forward(policy, split(q), of_kv, key_mask, scores.const_view());
    const auto d = dense_attention_vjp(policy, pass, split(d_out), split(q), of_kv, key_mask, scores.const_view());
    return {numbers_of(policy, pass.out), numbers_of(policy, d.d_q), numbers_of(policy, d.d_kv),
            numbers_of(policy, d.d_value_scale)};
}

/// Keys and values that are masked, and real tokens out of reach, are not seen even if they are not finite. (Sums come
/// in another order then.)
template <typename T>
void check_hidden_keys() {
    const Cuda policy;
    const double tolerance = std::is_same_v<T, float> ? 1e-5 : 3e-2;
    const Index length = 500;
    const auto mask = mask_of(policy, length);
    const auto check = [&](const std::vector<std::vector<double>>& actual,
                           const std::vector<std::vector<double>>& expected, Index row_of_nan, Index reach) {
        for (std::size_t part = 0; part < expected.size(); ++part) {
            CAPTURE(part);
            REQUIRE(actual[part].size() == expected[part].size());
            const auto width = static_cast<Index>(expected[part].size()) / (2 * length);
            double error = 0, largest = 0;
            for (std::size_t i = 0; i < expected[part].size(); ++i) {
                const Index row = static_cast<Index>(i) / width;
                if (row_of_nan >= 0 && std::abs(row - row_of_nan) <= 2 * reach) continue;
                const double difference = std::abs(actual[part][i] - expected[part][i]);
                error = std::isnan(difference) ? INFINITY : std::max(error, difference);
                largest = std::max(largest, std::abs(expected[part][i]));
            }
            CHECK(error <= tolerance * largest);
        }
    };
    for (const Index dim_head : {20, 64, 128})
        for (const Index reach : {0, 5, 64, 100}) {  // 0: dense
            CAPTURE(dim_head);
            CAPTURE(reach);
            const auto expected = attend<T>(policy, reach, length, dim_head, mask, 0);
            for (const float poison : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
                check(attend<T>(policy, reach, length, dim_head, mask, poison), expected, -1, reach);
            if (reach > 0) check(attend<T>(policy, reach, length, dim_head, mask, 0, 240), expected, 240, reach);
        }
}

/// The logit of the only key that a query sees has no gradient.
template <typename T>
void check_only_key() {
    const Cuda policy;
    const Index length = 500;
    MatrixTensor<bool, Cuda> mask(policy, {2, length});
    for (const Index dim_head : {20, 64, 128})
        for (const Index reach : {0, 5, 64, 100}) {
            CAPTURE(dim_head);
            CAPTURE(reach);
            fill_with(policy, mask, [&](std::size_t i) {
                const Index at = static_cast<Index>(i) % length;
                return reach > 0 ? at % (2 * reach + 1) == 3 : at == 77;
            });
            const auto all = attend<T>(policy, reach, length, dim_head, mask, 0);
            for (const double d_q : all[1]) CHECK(d_q == 0);
            for (std::size_t i = 0; i < all[2].size(); ++i) {
                const Index part = static_cast<Index>(i) / (reach > 0 ? 2 * dim_head : dim_head) % 2;
                if (part == 0) CHECK(all[2][i] == 0);  // keys
            }
        }
}

}  // namespace cases
