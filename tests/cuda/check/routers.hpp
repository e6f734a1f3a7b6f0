// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <colt5/cuda.cuh>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>
#include <vector>

#include "numbers.hpp"

/// The operations of routers at the ends of the range of numbers, and of Gumbel noise for many rows, slots and tokens.
namespace cases {

using namespace colt5;

/// A NaN among the real logits makes its row NaN and no other, in all routers, in rows of a block, a cluster and a
/// grid.
template <typename T>
void check_nan_logits() {
    constexpr T nan = std::numeric_limits<T>::quiet_NaN();
    const Cuda policy;
    for (const Index length : {33, 9000, 500'000})
        for (const Index place : {Index{0}, length / 2, length - 1})
            for (const bool masked : {false, true}) {
                CAPTURE(length);
                CAPTURE(place);
                CAPTURE(masked);
                std::vector<T> values;
                std::vector<char> real;  // every third token is masked, but for the one of the NaN
                const Random random(Seed{5});
                for (Index i = 0; i < 2 * length; ++i) {
                    real.push_back(!masked || i % 3 != 1 || i % length == place);
                    values.push_back(static_cast<T>(random.normal(static_cast<std::uint64_t>(i))));
                    if (!real.back()) values.back() = nan;
                }
                values[static_cast<std::size_t>(length + place)] = nan;
                const auto logits = from_host<TokensTensor<T, Cuda>>(policy, {2, 1, length}, values);
                MatrixTensor<bool, Cuda> mask_tensor(policy, {2, length});
                upload(policy, mask_tensor.data(), real.data(), real.size());
                const Mask mask = masked ? Mask(mask_tensor.const_view()) : Mask();

                const auto check_row = [&](const char* what, const auto& tensor,
                                           const std::vector<TokenIndex>& tokens) {
                    CAPTURE(what);
                    const auto all = numbers(policy, tensor);
                    const std::size_t each = all.size() / 2;
                    std::size_t wrong = 0;
                    for (std::size_t i = 0; i < all.size(); ++i) {
                        const auto token = tokens.empty() ? i
                                                          : i / each * static_cast<std::size_t>(length) +
                                                                static_cast<std::size_t>(tokens[i]);
                        const bool is_nan = i >= each && real[token] != 0;
                        wrong += is_nan ? !std::isnan(all[i]) : !std::isfinite(all[i]);
                        wrong += real[token] == 0 && all[i] != 0;
                    }
                    CHECK(wrong == 0);
                };
                const auto indices = top_k(policy, logits, mask, 20);
                const auto picks = to_host(policy, indices);
                CHECK(picks[20] == static_cast<TokenIndex>(place));
                const auto straight = straight_through_scores(policy, logits, indices, mask);
                check_row("straight-through", straight, picks);
                TokensTensor<T, Cuda> d_all(policy, {2, 1, length}), d_picks(policy, indices.shape());
                fill(policy, d_all, 1);
                fill(policy, d_picks, 1);
                for (const bool converged : {false, true}) {
                    const CoordinateDescent descent{.limit_k = true, .iterate_to_convergence = converged};
                    const auto saved = coordinate_descent_forward(policy, descent, 22, logits, mask);
                    check_row("descent", saved.scores, {});
                    const auto d = coordinate_descent_vjp(policy, descent, 22, saved, d_all, logits, mask);
                    check_row("descent's gradient", d.d_logits, {});
                    CHECK(std::isnan(numbers(policy, d.d_k)[1]));
                }
                check_row("cumulative softmax", cumulative_softmax(policy, 1.0, logits, indices, mask), picks);
                check_row("its gradient", cumulative_softmax_vjp(policy, 1.0, d_picks, logits, indices, mask), {});
                if (length > 1000) continue;
                const auto sinkhorn = sinkhorn_forward(policy, Sinkhorn{}, logits, {}, mask, 20);
                check_row("sinkhorn", sinkhorn.scores, to_host(policy, sinkhorn.indices));
                check_row("its gradient",
                          sinkhorn_vjp(policy, Sinkhorn{}, sinkhorn, d_picks, sinkhorn.indices, logits, {}, mask), {});
            }
}

/// The descent where exponentials overflow, where it could stop early but for the schedule, and solved for as many
/// tokens as are real; +∞; Sinkhorn at its floor.
template <typename T>
void check_ends_of_routers() {
    const Cuda policy;
    const double tolerance = std::is_same_v<T, float> ? 1e-4 : 1e-10;
    const auto logits_of = [&](const std::vector<double>& values) {
        std::vector<T> rounded(values.begin(), values.end());
        return from_host<TokensTensor<T, Cuda>>(policy, {1, 1, static_cast<Index>(values.size())}, rounded);
    };
    const auto ones_like = [&](const auto& tensor) {
        auto ones = tensor_like(policy, tensor);
        fill(policy, ones, 1);
        return ones;
    };
    // The second threshold is so far below the first that the exponential of their difference overflows: the steps from
    // there on count alone, and the start does not matter.
    const auto logits = logits_of({0.5, -1, 2, 0.25, -3, 1, 0.125, -0.5, 1.5});
    const CoordinateDescent far{.n_iters = 4, .eps = 1, .eps_init = 1e4, .eps_decay = 1e-4};
    const CoordinateDescent near{.n_iters = 4, .eps = 1, .eps_init = 30, .eps_decay = 1e-4};
    const auto g = logits_of({1, -1, 2, 0.5, 3, -2, 1, 1, 0.25});
    const auto far_saved = coordinate_descent_forward(policy, far, 3, logits, {});
    const auto near_saved = coordinate_descent_forward(policy, near, 3, logits, {});
    CHECK(largest_error(numbers(policy, far_saved.scores), numbers(policy, near_saved.scores)) <= tolerance);
    CHECK(largest_error(numbers(policy, coordinate_descent_vjp(policy, far, 3, far_saved, g, logits, {}).d_logits),
                        numbers(policy, coordinate_descent_vjp(policy, near, 3, near_saved, g, logits, {}).d_logits)) <=
          tolerance);

    // At ε = 2 these add up to k = 3 at the threshold 0, where the descent begins; at smaller ε they do not.
    const double half = -2 * std::log(2.0);
    const CoordinateDescent falling{.n_iters = 2, .eps = 0.25, .eps_init = 2, .eps_decay = 0.125};
    const auto still = coordinate_descent_forward(policy, falling, 3, logits_of({0, half, 0, half}), {});
    CHECK(numbers(policy, still.threshold)[2] ==
          doctest::Approx(0.25 * std::log((2 + 2 * std::exp(4 * half)) / 3)).epsilon(tolerance));

    for (const double k : {9.0, 9.5, 12.0})
        for (const bool limit_k : {false, true}) {
            const CoordinateDescent solved{.limit_k = limit_k, .iterate_to_convergence = true};
            const auto saved = coordinate_descent_forward(policy, solved, k, logits, {});
            const auto d = coordinate_descent_vjp(policy, solved, k, saved, g, logits, {});
            for (const double y : numbers(policy, saved.scores)) CHECK(y == 1);
            for (const double ds : numbers(policy, d.d_logits)) CHECK(ds == 0);
            CHECK(numbers(policy, d.d_k)[0] == 0);
        }

    // Samples that want no token, beside one that wants two.
    const auto of_three =
        from_host<TokensTensor<T, Cuda>>(policy, {3, 1, 3}, std::vector<T>{1, 0, 2, 1, 0, 2, 1, 0, 2});
    const auto wanted = from_host<VectorTensor<TokenIndex, Cuda>>(policy, {3}, std::vector<TokenIndex>{0, 2, -1});
    for (const bool converged : {false, true})
        for (const DescentStart start : {DescentStart::zero, DescentStart::minus_logits}) {
            const CoordinateDescent descent{.start = start, .iterate_to_convergence = converged};
            const DescentK k(SampleCount(2, wanted.const_view()), 1);
            const auto saved = coordinate_descent_forward(policy, descent, k, of_three, {});
            const auto d = coordinate_descent_vjp(policy, descent, k, saved, ones_like(of_three), of_three, {});
            const auto scores = numbers(policy, saved.scores), d_logits = numbers(policy, d.d_logits);
            for (const std::size_t i : {0, 1, 2, 6, 7, 8}) CHECK((scores[i] == 0 && d_logits[i] == 0));
            for (const std::size_t i : {3, 4, 5}) CHECK((scores[i] > 0.1 && scores[i] <= 1));
            CHECK((numbers(policy, d.d_k)[0] == 0 && numbers(policy, d.d_k)[2] == 0));
        }

    const auto infinite = logits_of({0, HUGE_VAL, -HUGE_VAL, HUGE_VAL});
    for (const bool converged : {false, true})
        for (const double k : {1.0, 2.0, 2.5}) {
            const CoordinateDescent descent{.iterate_to_convergence = converged};
            const auto saved = coordinate_descent_forward(policy, descent, k, infinite, {});
            const auto scores = numbers(policy, saved.scores);
            CHECK((scores[1] == 1 && scores[3] == 1 && scores[2] == 0 && scores[0] >= 0 && scores[0] <= 1));
            const auto d = coordinate_descent_vjp(policy, descent, k, saved, ones_like(infinite), infinite, {});
            for (const double ds : numbers(policy, d.d_logits)) CHECK(std::isfinite(ds));
        }
    const auto best = top_k(policy, infinite, Mask(), 3);
    const auto cumulative = numbers(policy, cumulative_softmax(policy, 1.0, infinite, best, {}));
    CHECK((cumulative[0] == 0.5 && cumulative[1] == 1 && cumulative[2] == 0));
    // Beside +∞ the exponential of 0 is 0, and so is its gradient, whatever the gradients of the scores.
    const auto d_infinite =
        numbers(policy, cumulative_softmax_vjp(policy, 1.0, logits_of({HUGE_VAL, 1, 1}), infinite, best, {}));
    CHECK((d_infinite[0] == 0 && d_infinite[2] == 0));

    if constexpr (std::is_same_v<T, double>) {  // the floor is no number of float
        const auto at_floor = logits_of({1e-20, 0.25e-20, 3e-20, std::nextafter(1e-20, 0.0), 2e-20});
        const auto above = logits_of({1, 1, 3, 1, 2});
        const auto noise = gumbel_noise<double>(policy, Random(Seed{3}), 1, 3, 5);
        const auto gradient = [&](const auto& s) {
            const auto saved = sinkhorn_forward(policy, Sinkhorn{}, s, noise.const_view(), {}, 3);
            return numbers(policy, sinkhorn_vjp(policy, Sinkhorn{}, saved, ones_like(saved.scores), saved.indices, s,
                                                noise.const_view(), {}));
        };
        const auto d = gradient(at_floor), expected = gradient(above);
        for (const std::size_t j : {0, 2, 4}) CHECK(d[j] * 1e-20 == doctest::Approx(expected[j]).epsilon(1e-8));
        CHECK((d[1] == 0 && d[3] == 0));
    }
}

/// Gumbel noise is the host's, for every row, and for tokens and slots beyond 2^24 and 2^20.
inline void check_gumbel_noise() {
    const Cuda policy;
    const Random random(Seed{3}, 7);
    const auto compare = [&](Index rows, Index slots, Index length, GumbelRows which) {
        const auto noise = to_host(policy, gumbel_noise<double>(policy, random, rows, slots, length, which));
        const Index count = rows * slots * length;
        double largest = 0;
        for (Index i = std::max(Index{0}, count - 1000); i < count; ++i) {
            const double expected = gumbel_of(random, which[i / length / slots], i / length % slots, i % length);
            largest = std::max(largest, std::abs(noise[static_cast<std::size_t>(i)] - expected));
        }
        CHECK(largest <= 1e-12);
    };
    compare(1, 1, (Index{1} << 24) + 500, {});
    compare(1, (Index{1} << 20) + 3, 2, {});
    compare((Index{1} << 20) + 3, 1, 2, {});
    compare(9, 3, 7, {(Index{1} << 31) + 5, 2});
}

}  // namespace cases
