// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <limits>
#include <numbers>
#include <type_traits>

#include "samples.hpp"

using namespace colt5;
using samples::close, samples::first_wrong;

namespace {

/// first_wrong for functions of one operand.
template <typename T, typename Ours, typename Exact>
std::string wrong(double low, double high, double ulps, const Ours& ours, const Exact& exact) {
    return first_wrong<T>(
        low, high, ulps, [&](const auto& x, const auto&) { return ours(x); },
        [&](double a, double) { return exact(a); });
}

}  // namespace

TEST_CASE_TEMPLATE("expressions: arithmetic equals a loop", T, float, double) {
    const auto sum = [](const auto& a, const auto& b) { return a + b; };
    const auto difference = [](const auto& a, const auto& b) { return a - b; };
    const auto product = [](const auto& a, const auto& b) { return a * b; };
    const auto quotient = [](const auto& a, const auto& b) { return a / b; };
    const auto negative = [](const auto& a) { return -a; };
    CHECK(first_wrong<T>(-2, 2, 1, sum, sum) == "none");
    CHECK(first_wrong<T>(-2, 2, 1, difference, difference) == "none");
    CHECK(first_wrong<T>(-2, 2, 1, product, product) == "none");
    CHECK(first_wrong<T>(1, 2, 1, quotient, quotient) == "none");
    CHECK(wrong<T>(-2, 2, 0, negative, negative) == "none");
}

TEST_CASE_TEMPLATE("expressions: functions of two operands equal a loop", T, float, double) {
    const auto larger = [](const auto& a, const auto& b) { return max(a, b); };
    const auto smaller = [](const auto& a, const auto& b) { return min(a, b); };
    const auto power = [](const auto& a, const auto& b) { return pow(a, b); };
    CHECK(first_wrong<T>(-2, 2, 0, larger, [](double a, double b) { return a > b ? a : b; }) == "none");
    CHECK(first_wrong<T>(-2, 2, 0, smaller, [](double a, double b) { return a < b ? a : b; }) == "none");
    CHECK(first_wrong<T>(0.1, 3, 10, power, [](double a, double b) { return std::pow(a, b); }) == "none");
}

TEST_CASE_TEMPLATE("expressions: functions equal a loop", T, float, double) {
    const auto exact_exp = [](double x) { return std::exp(x); };
    const auto exact_log = [](double x) { return std::log(x); };
    const auto exact_sqrt = [](double x) { return std::sqrt(x); };
    const auto exact_abs = [](double x) { return std::abs(x); };
    const auto exact_tanh = [](double x) { return std::tanh(x); };
    const auto exact_erf = [](double x) { return std::erf(x); };
    CHECK(wrong<T>(
              -5, 5, 2, [](const auto& x) { return exp(x); }, exact_exp) == "none");
    CHECK(wrong<T>(
              0.1, 5, 2, [](const auto& x) { return log(x); }, exact_log) == "none");
    CHECK(wrong<T>(
              0, 5, 1, [](const auto& x) { return sqrt(x); }, exact_sqrt) == "none");
    CHECK(wrong<T>(
              -5, 5, 0, [](const auto& x) { return abs(x); }, exact_abs) == "none");
    CHECK(wrong<T>(
              -5, 5, 2, [](const auto& x) { return tanh(x); }, exact_tanh) == "none");
    CHECK(wrong<T>(
              -3, 3, 80, [](const auto& x) { return erf(x); }, exact_erf) == "none");
}

TEST_CASE_TEMPLATE("expressions: compound functions equal a loop", T, float, double) {
    const auto exact_gelu = [](double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); };
    const auto exact_sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
    CHECK(wrong<T>(
              -5, 5, 1, [](const auto& x) { return square(x); }, [](double x) { return x * x; }) == "none");
    CHECK(wrong<T>(
              1, 5, 1, [](const auto& x) { return reciprocal(x); }, [](double x) { return 1 / x; }) == "none");
    CHECK(wrong<T>(
              -1, 5, 80, [](const auto& x) { return gelu(x); }, exact_gelu) == "none");
    CHECK(wrong<T>(
              -5, 5, 0, [](const auto& x) { return relu(x); }, [](double x) { return x > 0 ? x : 0; }) == "none");
    CHECK(wrong<T>(
              -5, 5, 4, [](const auto& x) { return sigmoid(x); }, exact_sigmoid) == "none");
    CHECK(wrong<T>(
              -5, 5, 4, [](const auto& x) { return silu(x); }, [&](double x) { return x * exact_sigmoid(x); }) ==
          "none");
}

TEST_CASE_TEMPLATE("expressions: GELU, its slope, ReLU, SiLU and the sigmoid far below 0, at the infinities and NaN", T,
                   float, double) {
    const auto exact_gelu = [](double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); };
    const auto exact_slope = [](double x) {
        return 0.5 * std::erfc(-x / std::sqrt(2.0)) + x * std::exp(-x * x / 2) * 0.39894228040143267794;
    };
    const auto exact_sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
    const auto silu_of = [](const auto& x) { return silu(x); };
    const bool single = std::is_same_v<T, float>;
    // beyond -8, the exact functions of double have larger errors than ours
    const double end = single ? -13 : -8, ulps = single ? 8 : 120;
    CHECK(wrong<T>(
              end, 1, ulps, [](const auto& x) { return gelu(x); }, exact_gelu) == "none");
    CHECK(wrong<T>(
              end, -1, ulps, [](const auto& x) { return gelu_slope(x); }, exact_slope) == "none");
    CHECK(wrong<T>(
              single ? -87 : -708, 1, 4, [](const auto& x) { return sigmoid(x); }, exact_sigmoid) == "none");
    CHECK(wrong<T>(single ? -91 : -708, 1, 6, silu_of, [&](double x) { return x * exact_sigmoid(x); }) == "none");

    const Cpu policy(1);
    const T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
    for (const Index columns : {1, 70}) {
        VectorTensor<T, Cpu> x(policy, {columns}), y(policy, {columns});
        const auto check = [&](T at, auto function, T want) {
            assign(policy, x, at);
            assign(policy, y, function(as_expression(x)));
            for (const T value : to_host(policy, y)) CHECK((value == want || (std::isnan(value) && std::isnan(want))));
        };
        const auto gelu_of = [](const auto& a) { return gelu(a); };
        const auto relu_of = [](const auto& a) { return relu(a); };
        const auto slope_of = [](const auto& a) { return gelu_slope(a); };
        const auto sigmoid_of = [](const auto& a) { return sigmoid(a); };
        for (const auto& [at, value, slope] :
             {std::array{-infinity, T(0), T(0)}, std::array{infinity, infinity, T(1)}, std::array{nan, nan, nan}}) {
            check(at, gelu_of, value);
            check(at, relu_of, value);
            check(at, silu_of, value);
            check(at, slope_of, slope);
            check(at, sigmoid_of, slope);
        }
    }
}

TEST_CASE_TEMPLATE("expressions: GELU with tanh and its slope, far below 0 and at the infinities", T, float, double) {
    // With long double, since 1 + tanh cancels; z = 2 u is the argument of the exponential, whose rounding decides.
    constexpr long double pi = std::numbers::pi_v<long double>;
    const auto z_of = [](long double x) { return std::sqrt(8 / pi) * (x + 0.044715L * x * x * x); };
    const auto exact = [&](double x) { return static_cast<double>(x / (1 + std::exp(-z_of(x)))); };
    const auto exact_slope = [&](double x) {
        const long double sigma = 1 / (1 + std::exp(-z_of(x)));
        const long double x_dz = std::sqrt(8 / pi) * (x + 3 * 0.044715L * x * x * x);
        return static_cast<double>(sigma + x_dz * sigma / (1 + std::exp(z_of(x))));
    };
    const auto as_in_t5 = [](double x) {
        return 0.5 * x * (1 + std::tanh(std::sqrt(2 / static_cast<double>(pi)) * (x + 0.044715 * x * x * x)));
    };
    const auto ours = [](const auto& x) { return gelu_tanh(x); };
    const auto slope = [](const auto& x) { return gelu_tanh_slope(x); };
    const bool single = std::is_same_v<T, float>;
    CHECK(wrong<T>(0, 5, 4, ours, as_in_t5) == "none");
    CHECK(wrong<T>(-1, 5, 6, ours, exact) == "none");
    CHECK(wrong<T>(-5, -1, 40, ours, exact) == "none");
    CHECK(wrong<T>(single ? -9.5 : -20, -5, single ? 200 : 1500, ours, exact) == "none");
    CHECK(wrong<T>(0, 5, 6, slope, exact_slope) == "none");
    CHECK(wrong<T>(-5, -1, 60, slope, exact_slope) == "none");
    CHECK(wrong<T>(single ? -9.5 : -20, -5, single ? 200 : 1500, slope, exact_slope) == "none");

    const Cpu policy(1);
    const T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
    for (const Index columns : {1, 70})
        for (const auto& known :
             {std::array{-infinity, T(0), T(0)}, std::array{T(-1e30), T(0), T(0)}, std::array{T(0), T(0), T(0.5)},
              std::array{T(1e30), T(1e30), T(1)}, std::array{infinity, infinity, T(1)}, std::array{nan, nan, nan}}) {
            // No structured binding: clang 16 cannot capture one with OpenMP.
            const T at = known[0], value = known[1], of_slope = known[2];
            CAPTURE(at);
            VectorTensor<T, Cpu> x(policy, {columns}), y(policy, {columns}), dy(policy, {columns});
            assign(policy, x, at);
            assign(policy, y, gelu_tanh(x));
            assign(policy, dy, gelu_tanh_slope(x));
            for (Index i = 0; i < columns; ++i) {
                CHECK((y.data()[i] == value || (std::isnan(value) && std::isnan(y.data()[i]))));
                CHECK((dy.data()[i] == of_slope || (std::isnan(of_slope) && std::isnan(dy.data()[i]))));
            }
        }
}

TEST_CASE("expressions: a number takes the type of its neighbour, on either side") {
    const Cpu policy(1);
    const auto x = samples::matrix<float>(policy, 3, 5, 1, 2);
    static_assert(std::is_same_v<decltype(2.5 - x)::value_type, float>);
    static_assert(std::is_same_v<decltype(x * 2)::value_type, float>);
    MatrixTensor<float, Cpu> out(policy, {3, 5});
    assign(policy, out, (2.5 - x) / 2);
    for (Index i = 0; i < x.size(); ++i) CHECK(out.data()[i] == (2.5f - x.data()[i]) / 2.0f);
    assign(policy, out, 1 / x);
    for (Index i = 0; i < x.size(); ++i) CHECK(out.data()[i] == 1.0f / x.data()[i]);
}

TEST_CASE_TEMPLATE("expressions: column_numbers count the columns of each row", T, float, double) {
    const Cpu policy(1);
    for (const Index columns : {1, 3, 16, 37}) {
        MatrixTensor<T, Cpu> out(policy, {5, columns});
        VectorTensor<T, Cpu> at(policy, {5});
        for (Index i = 0; i < 5; ++i) at.data()[i] = static_cast<T>(2 * i);
        assign(policy, out, cast<T>(column_numbers<T>() == column(at)) + T(0.5) * column_numbers<T>());
        for (Index i = 0; i < 5; ++i)
            for (Index j = 0; j < columns; ++j)
                CHECK(out.data()[i * columns + j] == (j == 2 * i ? 1 : 0) + T(0.5) * static_cast<T>(j));
    }
}
