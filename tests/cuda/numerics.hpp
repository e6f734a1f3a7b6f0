// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <colt5/cuda.cuh>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numbers>
#include <string>
#include <type_traits>
#include <vector>

/// Numbers at the ends of their range: what an operation in T makes of them follows from what it is.
namespace cases {

using namespace colt5;

template <typename V>
std::vector<double> numbers(const Cuda& policy, const V& tensor) {
    std::vector<double> all;
    for (const auto& value : to_host(policy, tensor)) all.push_back(static_cast<double>(value));
    return all;
}

/// Largest difference, relative to the largest expected number; infinite where one is not finite.
inline double largest_error(const std::vector<double>& actual, const std::vector<double>& expected, double factor = 1) {
    double difference = 0, largest = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
        if (!std::isfinite(actual[i]) || !std::isfinite(expected[i])) return std::numeric_limits<double>::infinity();
        difference = std::max(difference, std::abs(actual[i] * factor - expected[i]));
        largest = std::max(largest, std::abs(expected[i]));
    }
    return difference / largest;
}

template <typename T>
MatrixTensor<T, Cuda> normal_rows(const Cuda& policy, Index rows, Index columns, std::uint64_t seed, double factor) {
    std::vector<T> values;
    const Random random(Seed{seed});
    for (Index i = 0; i < rows * columns; ++i)  // rounded first: with any factor, the same digits
        values.push_back(static_cast<T>(
            static_cast<double>(static_cast<float>(static_cast<T>(random.normal(static_cast<std::uint64_t>(i))))) *
            factor));
    return from_host<MatrixTensor<T, Cuda>>(policy, {rows, columns}, values);
}

/// RMSNorm, LayerNorm and row_norm do not change with the scale of their rows, where squares leave the range either.
template <typename T>
void check_scale_of_norms() {
    using Sum = accumulate_t<T>;
    constexpr double tolerance = HalfPrecision<T> ? 2e-2 : std::is_same_v<T, float> ? 1e-5 : 1e-13;
    constexpr std::array scales =
        std::is_same_v<T, double> ? std::array{0x1p520, 0x1p1010} : std::array{0x1p66, 0x1p120};
    const Cuda policy;
    for (const Index d : {5, 37, 64, 256, 1000, 4096}) {
        CAPTURE(d);
        const auto gamma = normal_rows<T>(policy, 1, d, 1, 1), bias = normal_rows<T>(policy, 1, d, 2, 1);
        const auto d_y = normal_rows<T>(policy, 50, d, 3, 1);
        struct Of {
            std::vector<double> rms, rms_d_x, d_gamma, layer, layer_d_x, d_weight, d_bias, norm;
        };
        const auto compute = [&](double scale) {
            const auto x = normal_rows<T>(policy, 50, d, 4, scale);
            MatrixTensor<Sum, Cuda> sums(policy, {3, d});
            VectorTensor<T, Cuda> norm(policy, {50});
            set_zero(policy, sums);
            Of of;
            of.rms = numbers(policy, rms_norm(policy, x, gamma.const_view()[0]));
            of.rms_d_x = numbers(policy, rms_norm_vjp(policy, d_y, x, gamma.const_view()[0], sums.view()[0]));
            of.layer = numbers(policy, layer_norm(policy, x, gamma.const_view()[0], bias.const_view()[0]));
            of.layer_d_x =
                numbers(policy, layer_norm_vjp(policy, d_y, x, gamma.const_view()[0], sums.view()[1], sums.view()[2]));
            const auto all = numbers(policy, sums);
            const auto at = [&](Index row) { return all.begin() + row * d; };
            of.d_gamma.assign(at(0), at(1));
            of.d_weight.assign(at(1), at(2));
            of.d_bias.assign(at(2), at(3));
            assign(policy, norm, row_norm(x));
            of.norm = numbers(policy, norm);
            return of;
        };
        constexpr double base = 0x1p30;  // beside which ε is nothing
        const Of of = compute(base);
        for (const double scale : scales) {
            CAPTURE(scale);
            const Of large = compute(scale);
            CHECK(largest_error(large.rms, of.rms) <= tolerance);
            CHECK(largest_error(large.rms_d_x, of.rms_d_x, scale / base) <= tolerance);
            CHECK(largest_error(large.d_gamma, of.d_gamma) <= tolerance);
            CHECK(largest_error(large.layer, of.layer) <= tolerance);
            CHECK(largest_error(large.layer_d_x, of.layer_d_x, scale / base) <= tolerance);
            CHECK(largest_error(large.d_weight, of.d_weight) <= tolerance);
            CHECK(largest_error(large.d_bias, of.d_bias) <= tolerance);
            CHECK(largest_error(large.norm, of.norm, base / scale) <= tolerance);
            Of small = compute(1 / scale);
            for (double& norm : small.norm) norm *= scale;  // and then by base: together they may be too large
            CHECK(largest_error(small.norm, of.norm, base) <= tolerance);
        }
    }
    const auto ones = from_host<VectorTensor<T, Cuda>>(policy, {37}, std::vector<T>(37, T(1.0f)));
    auto zeros = tensor_like(policy, ones);
    set_zero(policy, zeros);
    MatrixTensor<T, Cuda> constant(policy, {3, 37});
    fill(policy, constant, 0.7 * static_cast<double>(std::numeric_limits<Sum>::max()));
    for (const double value : numbers(policy, layer_norm(policy, constant, ones, zeros))) CHECK(value == 0);
}

/// GELU and its gradient far below 0, in expressions and in the feedforward's backward pass, and SiLU.
template <typename T>
void check_gelu_tail() {
    constexpr double tolerance = HalfPrecision<T> ? 1e-2 : std::is_same_v<T, float> ? 2e-6 : 1e-14;
    constexpr double infinity = std::numeric_limits<double>::infinity();
    const Cuda policy;
    std::vector<T> values;
    for (int i = 0; i <= 400; ++i) values.push_back(static_cast<T>(-12.5 + 0.035 * i));
    for (const double end : {-infinity, infinity, std::nan("")}) values.push_back(static_cast<T>(end));
    const auto x = from_host<VectorTensor<T, Cuda>>(policy, {static_cast<Index>(values.size())}, values);
    auto slope = tensor_like(policy, x);
    fill(policy, slope, 1);
    gelu_vjp(policy, slope, x);
    auto silu_of = tensor_like(policy, x);
    assign(policy, silu_of, silu(as_expression(x)));
    const auto at = numbers(policy, x), y = numbers(policy, gelu_forward(policy, x)), d = numbers(policy, slope),
               s = numbers(policy, silu_of);
    for (std::size_t i = 0; i + 3 < at.size(); ++i) {
        const long double v = at[i], cumulative = std::erfc(-v / std::numbers::sqrt2_v<long double>) / 2;
        const long double density = std::exp(-v * v / 2) / std::sqrt(2 * std::numbers::pi_v<long double>);
        const auto error = [](double got, long double want) {
            return static_cast<double>(std::abs((got - want) / want));
        };
        CAPTURE(at[i]);
        CHECK(error(y[i], v * cumulative) <= tolerance);
        if (std::abs(v + 0.7518L) > 0.1L) CHECK(error(d[i], cumulative + v * density) <= 10 * tolerance);
    }
    const std::size_t low = at.size() - 3, high = low + 1, no_number = low + 2;
    CHECK((y[low] == 0 && d[low] == 0 && s[low] == 0));
    CHECK((y[high] == infinity && d[high] == 1 && s[high] == infinity));
    CHECK((std::isnan(y[no_number]) && std::isnan(d[no_number]) && std::isnan(s[no_number])));
}

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
                    const auto pass = coordinate_descent_forward(policy, descent, 22, logits, mask);
                    check_row("descent", pass.scores, {});
                    const auto d = coordinate_descent_vjp(policy, descent, 22, pass, d_all, logits, mask);
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
    const auto far_pass = coordinate_descent_forward(policy, far, 3, logits, {});
    const auto near_pass = coordinate_descent_forward(policy, near, 3, logits, {});
    CHECK(largest_error(numbers(policy, far_pass.scores), numbers(policy, near_pass.scores)) <= tolerance);
    CHECK(largest_error(numbers(policy, coordinate_descent_vjp(policy, far, 3, far_pass, g, logits, {}).d_logits),
                        numbers(policy, coordinate_descent_vjp(policy, near, 3, near_pass, g, logits, {}).d_logits)) <=
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
            const auto pass = coordinate_descent_forward(policy, solved, k, logits, {});
            const auto d = coordinate_descent_vjp(policy, solved, k, pass, g, logits, {});
            for (const double y : numbers(policy, pass.scores)) CHECK(y == 1);
            for (const double ds : numbers(policy, d.d_logits)) CHECK(ds == 0);
            CHECK(numbers(policy, d.d_k)[0] == 0);
        }

    const auto infinite = logits_of({0, HUGE_VAL, -HUGE_VAL, HUGE_VAL});
    for (const bool converged : {false, true})
        for (const double k : {1.0, 2.0, 2.5}) {
            const CoordinateDescent descent{.iterate_to_convergence = converged};
            const auto pass = coordinate_descent_forward(policy, descent, k, infinite, {});
            const auto scores = numbers(policy, pass.scores);
            CHECK((scores[1] == 1 && scores[3] == 1 && scores[2] == 0 && scores[0] >= 0 && scores[0] <= 1));
            const auto d = coordinate_descent_vjp(policy, descent, k, pass, ones_like(infinite), infinite, {});
            for (const double ds : numbers(policy, d.d_logits)) CHECK(std::isfinite(ds));
        }
    const auto best = top_k(policy, infinite, Mask(), 3);
    const auto cumulative = numbers(policy, cumulative_softmax(policy, 1.0, infinite, best, {}));
    CHECK((cumulative[0] == 0.5 && cumulative[1] == 1 && cumulative[2] == 0));

    if constexpr (std::is_same_v<T, double>) {  // the floor is no number of float
        const auto at_floor = logits_of({1e-20, 0.25e-20, 3e-20, std::nextafter(1e-20, 0.0), 2e-20});
        const auto above = logits_of({1, 1, 3, 1, 2});
        const auto noise = gumbel_noise<double>(policy, Random(Seed{3}), 1, 3, 5);
        const auto gradient = [&](const auto& s) {
            const auto pass = sinkhorn_forward(policy, Sinkhorn{}, s, noise.const_view(), {}, 3);
            return numbers(policy, sinkhorn_vjp(policy, Sinkhorn{}, pass, ones_like(pass.scores), pass.indices, s,
                                                noise.const_view(), {}));
        };
        const auto d = gradient(at_floor), expected = gradient(above);
        for (const std::size_t j : {0, 2, 4}) CHECK(d[j] * 1e-20 == doctest::Approx(expected[j]).epsilon(1e-8));
        CHECK((d[1] == 0 && d[3] == 0));
    }
}

/// Norms of gradients whose squares double cannot hold, and AdamW without eps.
inline void check_ends_of_optimizers() {
    const Cuda policy;
    const auto unit = normal_rows<double>(policy, 30, 40, 6, 1);
    const double norm = std::sqrt(sum_of_squares(policy, unit));
    for (const double factor : {0x1p520, 0x1p1010, 0x1p-560, 0x1p-1000}) {
        const auto x = normal_rows<double>(policy, 30, 40, 6, factor);
        const double found = scaled_norm<double>([&](double scale) { return sum_of_squares(policy, x, scale); });
        CHECK(found / factor == doctest::Approx(norm).epsilon(1e-13));
    }
    VectorTensor<float, Cuda> parameter(policy, {70}), gradient(policy, {70}), mean(policy, {70}), square(policy, {70});
    fill(policy, parameter, 2);
    for (auto* zeros : {&gradient, &mean, &square}) set_zero(policy, *zeros);
    const AdamWCoefficients coefficients{
        .keep = 1, .beta1 = 0.9, .beta2 = 0.999, .step_size = 5, .square_bias = 0.03, .eps = 0};
    adamw_update(policy, parameter, {}, gradient, mean, square, coefficients);
    for (const double value : numbers(policy, parameter)) CHECK(value == 2);
}

}  // namespace cases
