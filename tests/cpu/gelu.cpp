// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <limits>
#include <numbers>
#include <type_traits>
#include <vector>

#include <colt5/cpu/feed_forward.hpp>
#include <colt5/cpu/simd.hpp>

using namespace colt5;

namespace {

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, float>, double, long double>;

template <typename W>
W exact_gelu(W x) {
    return W(0.5) * x * std::erfc(-x / std::numbers::sqrt2_v<W>);
}
template <typename W>
W exact_slope(W x) {
    const W density = std::numbers::inv_sqrtpi_v<W> / std::numbers::sqrt2_v<W>;
    return W(0.5) * std::erfc(-x / std::numbers::sqrt2_v<W>) + x * density * std::exp(-x * x / 2);
}

/// What the feedforward computes at many places of [low, high].
template <typename T>
struct Rows {
    Rows(double low, double high) {
        constexpr Index count = 100003;
        for (Index i = 0; i < count; ++i)
            x.push_back(static_cast<T>(low + (high - low) * static_cast<double>(i) / static_cast<double>(count - 1)));
        y = with_slope = slope = x;
        cpu::gelu_row(x.data(), count, y.data());
        cpu::gelu_row_with_slope(x.data(), count, with_slope.data(), slope.data());
    }
    std::vector<T> x, y, with_slope, slope;
};

template <typename T>
double ulps(T got, Wide<T> want) {
    const T magnitude = std::abs(static_cast<T>(want));
    const T unit = std::nextafter(magnitude, std::numeric_limits<T>::infinity()) - magnitude;
    return static_cast<double>(std::abs(static_cast<Wide<T>>(got) - want) / static_cast<Wide<T>>(unit));
}

}  // namespace

TEST_CASE_TEMPLATE(
    "gelu: within 7 ULP (double: 10) through the tail, and its slope within 8 below -1 and 3 of 1 everywhere", T, float,
    double) {
    // to where the value, and for the slope exp(−x² / 2), is the smallest normal number
    const double value_end = std::is_same_v<T, float> ? -13.1 : -37.6;
    const double slope_end = std::is_same_v<T, float> ? -13.2 : -37.6;
    double worst = 0, worst_slope = 0, worst_difference = 0;
    for (const auto& [low, high] : {std::array{value_end, 12.0}, std::array{-2.0, 2.0}, std::array{-1e-3, 1e-3}}) {
        const Rows<T> rows(low, high);
        CHECK(rows.with_slope == rows.y);
        for (std::size_t i = 0; i < rows.x.size(); ++i) {
            const auto x = static_cast<Wide<T>>(rows.x[i]);
            worst = std::fmax(worst, ulps(rows.y[i], exact_gelu(x)));
            const auto slope = exact_slope(x);
            worst_difference =
                std::fmax(worst_difference, static_cast<double>(std::abs(static_cast<Wide<T>>(rows.slope[i]) - slope)));
        }
    }
    const Rows<T> rows(slope_end, -1);
    for (std::size_t i = 0; i < rows.x.size(); ++i)
        worst_slope = std::fmax(worst_slope, ulps(rows.slope[i], exact_slope(static_cast<Wide<T>>(rows.x[i]))));
    CHECK(worst <= (std::is_same_v<T, float> ? 7 : 10));
    CHECK(worst_slope <= 8);
    CHECK(worst_difference <= 3 * static_cast<double>(std::numeric_limits<T>::epsilon()));
}

TEST_CASE_TEMPLATE("gelu: at the ends of its range", T, float, double) {
    constexpr T infinity = std::numeric_limits<T>::infinity(), largest = std::numeric_limits<T>::max();
    using B = cpu::Batch<T>;
    for (const T x : {-infinity, -largest, T(-1000), T(-50)}) {
        CHECK(cpu::gelu(B(x)).get(0) == T(0));
        CHECK(cpu::gelu_slope(B(x)).get(0) == T(0));
    }
    for (const T x : {infinity, largest, T(1000), T(50)}) {
        CHECK(cpu::gelu(B(x)).get(0) == x);
        CHECK(cpu::gelu_slope(B(x)).get(0) == T(1));
    }
    CHECK(cpu::gelu(B(T(0))).get(0) == T(0));
    CHECK(cpu::gelu_slope(B(T(0))).get(0) == T(0.5));
    CHECK(std::isnan(cpu::gelu(B(std::numeric_limits<T>::quiet_NaN())).get(0)));
    CHECK(std::isnan(cpu::gelu_slope(B(std::numeric_limits<T>::quiet_NaN())).get(0)));
}
