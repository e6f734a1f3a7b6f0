// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <colt5/cuda.cuh>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>
#include <vector>

#include "numbers.hpp"
#include "padded_tokens.hpp"

/// Attention with keys that are masked or out of reach, and with a single key.
namespace cases {

using namespace colt5;

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
        const auto saved = local_attention_forward(policy, attention, split(q), of_kv, mask);
        const auto d = local_attention_vjp(policy, attention, saved, split(d_out), split(q), of_kv, mask);
        std::vector<std::vector<double>> all{numbers(policy, saved.out), {}, {}};
        const auto of_qkv = numbers(policy, d);
        for (std::size_t i = 0; i < of_qkv.size(); ++i)  // d_q, then d_k and d_v
            all[static_cast<Index>(i) / (2 * dim_head) % 3 == 0 ? 1 : 2].push_back(of_qkv[i]);
        return all;
    }
    TokensTensor<accumulate_t<T>, Cuda> scores(policy, {2, 1, length});
    fill_normal(policy, scores, Random(Seed{8}));
    const auto of_kv = kv.view().reshape(std::array<Index, 6>{2, 1, length, 2, 2, dim_head});
    const KeyMask key_mask = mask.reshape(std::array<Index, 3>{2, 1, length});
    const auto saved = dense_attention_forward(policy, split(q), of_kv, key_mask, scores.const_view());
    const auto d = dense_attention_vjp(policy, saved, split(d_out), split(q), of_kv, key_mask, scores.const_view());
    return {numbers(policy, saved.out), numbers(policy, d.d_q), numbers(policy, d.d_kv),
            numbers(policy, d.d_value_scale)};
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
