// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <colt5/cuda.cuh>

#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>
#include <vector>

#include "numbers.hpp"

/// Norms at the ends of the range of numbers, and of NaN.
namespace cases {

using namespace colt5;

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
        constexpr double base = 0x1p30;  // at this scale ε does not matter
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

    // A NaN makes its row NaN, and no other.
    std::vector<T> with_nan(2 * 37, T(1.5f));
    with_nan[5] = T(std::numeric_limits<float>::quiet_NaN());
    const auto x = from_host<MatrixTensor<T, Cuda>>(policy, {2, 37}, with_nan);
    const auto d_y = normal_rows<T>(policy, 2, 37, 3, 1);
    VectorTensor<Sum, Cuda> d_weight(policy, {37}), d_bias(policy, {37});
    for (const auto& results :
         {numbers(policy, rms_norm(policy, x, ones)), numbers(policy, layer_norm(policy, x, ones, zeros)),
          numbers(policy, rms_norm_vjp(policy, d_y, x, ones, d_weight.view())),
          numbers(policy, layer_norm_vjp(policy, d_y, x, ones, d_weight.view(), d_bias.view()))})
        for (std::size_t i = 0; i < results.size(); ++i) CHECK(std::isnan(results[i]) == (i < 37));
}

}  // namespace cases
