// SPDX-License-Identifier: MIT
#include <colt5/op/topk.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <array>

#include <colt5/cpu.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {
constexpr TopkOptions options{.coor_descent_k_ratio = 1.25, .n_iters = 9, .eps = 0.3, .eps_init = 2, .eps_decay = 0.6};
}

TEST_CASE_TEMPLATE("topk: values, indices and gates; masked numbers are not chosen", T, float, double) {
    const Cpu policy(2);
    const auto x = normal<T>(policy, std::array<Index, 3>{3, 2, 17}, 0);
    auto some = random_mask(policy, std::array<Index, 2>{3, 17}, 1);
    std::fill_n(some.view()[2].data() + 2, 15, false);  // fewer real numbers than are asked for
    for (const Mask mask : {Mask(), some.const_view()})
        for (const Index k : {1, 5, 17, 30}) {
            CAPTURE(k);
            const auto result = topk(policy, x, k, options, mask);
            CHECK(same_bits(result.indices, top_k(policy, x, mask, k)));
            const auto scores =
                coordinate_descent_forward(policy, options.descent(), static_cast<double>(k) * 1.25, x, mask).scores;
            for (Index b = 0; b < 3; ++b)
                for (Index r = 0; r < 2; ++r)
                    for (Index i = 0; i < result.indices.extent(2); ++i) {
                        const Index at = result.indices.const_view()(b, r, i);
                        const bool real = !mask || mask(b, at);
                        CHECK(result.values.const_view()(b, r, i) == (real ? x.const_view()(b, r, at) : T(0)));
                        CHECK(result.gates.const_view()(b, r, i) == (real ? T(1) : T(0)));
                        CHECK(result.coor_descent_values.const_view()(b, r, i) ==
                              (real ? scores.const_view()(b, r, at) : T(0)));
                    }
        }
}

TEST_CASE("topk: the gradients are those of finite differences, with the scores in the place of the gates") {
    const Cpu policy(1);
    auto x = normal<double>(policy, std::array<Index, 3>{2, 2, 13}, 0);
    const auto some = random_mask(policy, std::array<Index, 2>{2, 13}, 1);
    for (const Mask mask : {Mask(), some.const_view()}) {
        const auto saved = topk(policy, x, 4, options, mask);
        const auto d_values = normal<double>(policy, saved.values.shape(), 2);
        const auto d_gates = normal<double>(policy, saved.values.shape(), 3);
        const auto d_scores = normal<double>(policy, saved.values.shape(), 4);
        const auto constant = copy_of(policy, saved.coor_descent_values);
        // A gate is score + (1 − score), and only the first has a gradient.
        const auto loss = [&] {
            const auto now = topk(policy, x, 4, options, mask);
            double sum = 0;
            for (Index i = 0; i < now.values.size(); ++i) {
                const double gate = now.coor_descent_values.data()[i] + 1 - constant.data()[i];
                sum += d_values.data()[i] * now.values.data()[i] * gate + d_gates.data()[i] * gate +
                       d_scores.data()[i] * now.coor_descent_values.data()[i];
            }
            return sum;
        };
        const auto d_x = topk_vjp(policy, saved, d_values, x, 4, options, mask, d_gates, d_scores);
        CHECK(relative_error(d_x, finite_differences(policy, x, loss)) <= 1e-6);
    }
}

TEST_CASE("topk: errors name the argument and what it must be") {
    const Cpu policy(1);
    const auto x = normal<float>(policy, std::array<Index, 3>{1, 1, 5}, 0);
    const auto saved = topk(policy, x, 2);
    CHECK_THROWS_WITH_AS(topk(policy, x, 0), "colt5: `k` must be >= 1, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(topk(policy, x, 2, {.coor_descent_k_ratio = 0.5}),
                         "colt5: `coor_descent_k_ratio` must be >= 1, but is 0.5", ValueError);
    CHECK_THROWS_WITH_AS(topk_vjp(policy, saved, x, x, 2),
                         "colt5: `d_values` must have shape (1, 1, 2), but has (1, 1, 5)", ShapeError);
}
