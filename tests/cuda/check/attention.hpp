// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <colt5/cuda.cuh>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>
#include <vector>

#include "numbers.hpp"
#include "padded_tokens.hpp"

/// Attention with keys that are masked, out of reach or seen by no query, and with a single key.
namespace cases {

using namespace colt5;

/// What local attention takes of the bias of dense attention.
template <typename Sum>
const RelativePositionBias<Sum>& local_bias_of(const RoutedPositionBias<Sum>& bias) {
    return bias;
}
inline NoBias local_bias_of(NoBias) {
    return {};
}

/// Outputs and gradients of local attention (2, length, 2, dim_head), or of dense attention with scores, whose masked
/// keys and values hold `padding`, and whose token `at`, if there is one, is NaN. With a relative position bias, the
/// gradient of its table comes last.
template <bool has_bias, typename T>
std::vector<std::vector<double>> attend(const Cuda& policy, Index reach, Index length, Index dim_head, Mask mask,
                                        float padding, Index at = -1) {
    using Sum = accumulate_t<T>;
    auto q = tokens_with_padding<T>(policy, length, 2 * dim_head, 3, mask, 1);
    auto kv = tokens_with_padding<T>(policy, length, 4 * dim_head, 4, mask, padding);
    // The masked queries are all alike. With a bias they have no gradient: where all keys that they see are in one
    // bucket, their terms in its gradient sum to 0, but for the rounding of `out`, which has the same sign in all of
    // them.
    auto d_out = tokens_with_padding<T>(policy, length, 2 * dim_head, 5, mask, has_bias ? 0 : 0.5f);
    if (at >= 0)
        for (auto* const tensor : {&q, &kv, &d_out})
            assign(policy, tensor->view()[0].range(at, 1), std::bit_cast<float>(0x7FFFFFFFu));  // a GPU's NaN
    const auto split = [&](auto& tensor) {
        return tensor.view().reshape(std::array<Index, 4>{2, length, 2, dim_head});
    };
    const RelativePositionBuckets buckets{32, 60};
    MatrixTensor<Sum, Cuda> table(policy, {32, 2}), d_table(policy, {32, 2});
    fill_normal(policy, table, Random(Seed{9}));
    set_zero(policy, d_table);
    const auto by_distance = relative_position_bias(policy, buckets, table, reach > 0 ? reach : buckets.max_distance);
    const auto with_bias = [&](auto&& run) {  // run(bias, d_table)
        if constexpr (has_bias)
            run(RoutedPositionBias<Sum>{{buckets, by_distance.const_view()}, {}, {}}, d_table.view());
        else
            run(NoBias(), NoBias());
    };
    std::vector<std::vector<double>> all;
    if (reach > 0) {
        const auto of_kv = kv.view().reshape(std::array<Index, 5>{2, length, 2, 2, dim_head});
        const LocalAttention attention{reach};
        with_bias([&](const auto& given, const auto& d_given) {
            const auto& bias = local_bias_of(given);
            const auto saved = local_attention_forward(policy, attention, split(q), of_kv, mask, 0, bias);
            const auto d =
                local_attention_vjp(policy, attention, saved, split(d_out), split(q), of_kv, mask, bias, d_given);
            all = {numbers(policy, saved.out), {}, {}};
            const auto of_qkv = numbers(policy, d);
            for (std::size_t i = 0; i < of_qkv.size(); ++i)  // d_q, then d_k and d_v
                all[static_cast<Index>(i) / (2 * dim_head) % 3 == 0 ? 1 : 2].push_back(of_qkv[i]);
        });
        if (has_bias) all.push_back(numbers(policy, d_table));
        return all;
    }
    TokensTensor<accumulate_t<T>, Cuda> scores(policy, {2, 1, length});
    fill_normal(policy, scores, Random(Seed{8}));
    const auto of_kv = kv.view().reshape(std::array<Index, 6>{2, 1, length, 2, 2, dim_head});
    const KeyMask key_mask = mask.reshape(std::array<Index, 3>{2, 1, length});
    with_bias([&](const auto& bias, const auto& d_given) {
        const auto saved = dense_attention_forward(policy, split(q), of_kv, key_mask, scores.const_view(), bias);
        const auto d = dense_attention_vjp(policy, saved, split(d_out), split(q), of_kv, key_mask, scores.const_view(),
                                           bias, d_given);
        all = {numbers(policy, saved.out), numbers(policy, d.d_q), numbers(policy, d.d_kv),
               numbers(policy, d.d_value_scale)};
    });
    if (has_bias) all.push_back(numbers(policy, d_table));
    return all;
}

/// Keys and values that are masked, and real tokens out of reach, are not seen even if they are not finite. (Sums come
/// in another order then.)
template <typename T, bool has_bias = false>
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
            const Index width = std::max(Index{1}, static_cast<Index>(expected[part].size()) / (2 * length));
            double error = 0, largest = 0;
            for (std::size_t i = 0; i < expected[part].size(); ++i) {
                const Index row = static_cast<Index>(i) / width;
                if (row_of_nan >= 0 && std::abs(row - row_of_nan) <= 2 * reach) continue;
                const double difference = std::abs(actual[part][i] - expected[part][i]);
                error = std::isnan(difference) ? std::numeric_limits<double>::infinity() : std::max(error, difference);
                largest = std::max(largest, std::abs(expected[part][i]));
            }
            CHECK(error <= tolerance * largest);
        }
    };
    for (const Index dim_head : {20, 64, 128})
        for (const Index reach : {0, 5, 64, 100}) {  // 0: dense
            CAPTURE(dim_head);
            CAPTURE(reach);
            auto expected = attend<has_bias, T>(policy, reach, length, dim_head, mask, 0);
            for (const float poison : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
                check(attend<has_bias, T>(policy, reach, length, dim_head, mask, poison), expected, -1, reach);
            if (has_bias) expected.pop_back();  // the gradient of the table sees the NaN
            if (reach > 0)
                check(attend<has_bias, T>(policy, reach, length, dim_head, mask, 0, 240), expected, 240, reach);
        }
}

/// In dense attention, a key that no query sees has gradients of 0, also if its key, its value or its value's scale is
/// not finite, which changes no other gradient.
template <typename T>
void check_unseen_keys() {
    using Sum = accumulate_t<T>;
    const Cuda policy;
    const double tolerance = std::is_same_v<T, float> ? 1e-5 : 3e-2;
    constexpr Index length = 200, keys = 150, seen = 100, heads = 2;
    TokensTensor<TokenIndex, Cuda> counts(policy, {1, 1, length});
    fill_with(policy, counts, [&](std::size_t i) { return static_cast<Index>(i) % (seen + 1); });
    FirstKeys<> first_keys;
    first_keys.counts = counts.const_view();
    for (const Index dim_head : {20, 64, 128}) {
        CAPTURE(dim_head);
        Tensor<T, Cuda, dynamic, dynamic, dynamic, dynamic> q(policy, {1, length, heads, dim_head});
        auto d_out = tensor_like(policy, q);
        fill_normal(policy, q, Random(Seed{3}));
        fill_normal(policy, d_out, Random(Seed{4}));
        // The outputs and gradients if one part of the unseen keys is `poison`: 0 the key, 1 the value, 2 its scale.
        const auto attend_with = [&](Index part, double poison) {
            Tensor<T, Cuda, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv(policy,
                                                                                     {1, 1, keys, heads, 2, dim_head});
            TokensTensor<Sum, Cuda> scale(policy, {1, 1, keys});
            fill_with(policy, kv, [&](std::size_t i) {
                const Index vector = static_cast<Index>(i) / dim_head;
                return vector / (2 * heads) >= seen && vector % 2 == part ? poison : Random(Seed{5}).normal(i);
            });
            fill_with(policy, scale, [&](std::size_t i) {
                return static_cast<Index>(i) >= seen && part == 2 ? poison : Random(Seed{6}).normal(i);
            });
            const auto saved = dense_attention_forward(policy, q, kv, {}, scale.const_view(), first_keys);
            const auto d = dense_attention_vjp(policy, saved, d_out, q, kv, {}, scale.const_view(), first_keys);
            return std::vector<std::vector<double>>{numbers(policy, saved.out), numbers(policy, d.d_q),
                                                    numbers(policy, d.d_kv), numbers(policy, d.d_value_scale)};
        };
        const auto expected = attend_with(-1, 0);
        for (const Index part : {0, 1, 2})
            for (const double poison :
                 {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
                CAPTURE(part);
                CAPTURE(poison);
                const auto actual = attend_with(part, poison);
                for (std::size_t i = 0; i < expected.size(); ++i) {
                    CAPTURE(i);
                    CHECK(largest_error(actual[i], expected[i]) <= tolerance);
                }
                const auto is_zero = [](double d) { return d == 0; };
                CHECK(std::all_of(actual[2].begin() + seen * heads * 2 * dim_head, actual[2].end(), is_zero));
                CHECK(std::all_of(actual[3].begin() + seen, actual[3].end(), is_zero));
            }
    }
}

/// The logit of the only key that a query sees has no gradient.
template <typename T, bool has_bias = false>
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
            const auto all = attend<has_bias, T>(policy, reach, length, dim_head, mask, 0);
            if (has_bias)
                for (const double d : all.back()) CHECK(d == 0);
            for (const double d_q : all[1]) CHECK(d_q == 0);
            for (std::size_t i = 0; i < all[2].size(); ++i) {
                const Index part = static_cast<Index>(i) / (reach > 0 ? 2 * dim_head : dim_head) % 2;
                if (part == 0) CHECK(all[2][i] == 0);  // keys
            }
        }
}

/// Of a query that sees one key: NaN in the query reaches its gradient. NaN in a key that it does not see changes
/// nothing for it, nor for the key that it sees.
template <typename T, bool has_bias = false>
void check_nan_beside_only_key() {
    using Sum = accumulate_t<T>;
    const Cuda policy;
    const Index length = 300, heads = 2, dim_head = 64, row = heads * dim_head, reach = 4;
    const LocalAttention attention{.reach = reach, .causal = true};  // query 0 sees key 0 alone
    const RelativePositionBuckets buckets{32, 60};
    MatrixTensor<Sum, Cuda> table(policy, {32, heads}), d_table(policy, {32, heads});
    fill_normal(policy, table, Random(Seed{1}));
    const auto by_distance = relative_position_bias(policy, buckets, table, reach);
    // d_qkv of the first tokens, if row `at` of q or of the keys is NaN
    const auto gradients = [&](bool of_keys, Index at) {
        Tensor<T, Cuda, dynamic, dynamic, dynamic, dynamic> q(policy, {1, length, heads, dim_head});
        Tensor<T, Cuda, dynamic, dynamic, dynamic, dynamic, dynamic> kv(policy, {1, length, 2, heads, dim_head});
        auto d_out = tensor_like(policy, q);
        fill_normal(policy, d_out, Random(Seed{2}));
        const auto fill = [&](auto& tensor, Index stride, bool poisoned, Seed seed) {
            fill_with(policy, tensor, [&](std::size_t i) {
                const Index token = static_cast<Index>(i) / stride, in_row = static_cast<Index>(i) % stride;
                return poisoned && token == at && in_row < row ? std::numeric_limits<double>::quiet_NaN()
                                                               : Random(seed).normal(i);
            });
        };
        fill(q, row, !of_keys, Seed{3});
        fill(kv, 2 * row, of_keys, Seed{4});
        set_zero(policy, d_table);
        const auto run = [&](const auto& bias, const auto& d_bias) {
            const auto saved = local_attention_forward(policy, attention, q, kv, {}, 0, bias);
            return numbers(policy, local_attention_vjp(policy, attention, saved, d_out, q, kv, {}, bias, d_bias));
        };
        if constexpr (has_bias)
            return run(RelativePositionBias<Sum>{buckets, by_distance.const_view()}, d_table.view());
        else
            return run(NoBias(), NoBias());
    };
    const auto expected = gradients(false, -1), of_query = gradients(false, 0), of_key = gradients(true, reach + 1);
    for (Index i = 0; i < row; ++i) CHECK(std::isnan(of_query[static_cast<std::size_t>(i)]));
    for (Index i = 0; i < 3 * row; ++i) {
        CAPTURE(i);
        const auto at = static_cast<std::size_t>(i);
        CHECK(of_key[at] == doctest::Approx(expected[at]).epsilon(0.02));
    }
}

}  // namespace cases
