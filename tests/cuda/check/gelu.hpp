// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <colt5/cuda.cuh>

#include <cmath>
#include <cstddef>
#include <limits>
#include <numbers>
#include <type_traits>
#include <vector>

#include "numbers.hpp"

/// GELU and SiLU at the ends of the range of numbers.
namespace cases {

using namespace colt5;

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

}  // namespace cases
