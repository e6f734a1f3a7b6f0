// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <limits>
#include <numbers>
#include <vector>

#include <colt5/cpu/expr.hpp>
#include <colt5/op/gelu.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

TEST_CASE("gelu: agrees with x Φ(x) in double and float, from -40 to 40") {
    const Cpu policy(2);
    auto x = normal<double>(policy, std::array<Index, 3>{2, 67, 9}, 0, 10.0);
    auto expected = tensor_like(policy, x);
    for (Index i = 0; i < x.size(); ++i) {
        const double value = x.data()[i];
        expected.data()[i] = value * 0.5 * std::erfc(-value / std::sqrt(2.0));
    }
    CHECK(relative_error(gelu_forward(policy, x), expected) <= 1e-15);

    HostTensor<float, 3> single(policy, x.shape());
    assign(policy, single, cast<float>(x));
    CHECK(relative_error(gelu_forward(policy, single), expected) <= 1e-6);
}

TEST_CASE_TEMPLATE("gelu: no cancellation far below 0, both ways, and no NaN of infinities", T, float, double) {
    const Cpu policy(1);
    constexpr T infinity = std::numeric_limits<T>::infinity();
    const std::vector<T> at{T(-3), T(-5), T(-5.5), T(-6), T(-10), T(-12.5), -infinity, infinity};
    const auto x = from_host<VectorTensor<T, Cpu>>(policy, {static_cast<Index>(at.size())}, at);
    auto slope = filled<T>(policy, x.shape(), 1);
    const auto y = gelu_forward(policy, x);
    gelu_vjp(policy, slope, x);
    for (Index i = 0; i + 2 < x.size(); ++i) {
        const long double v = x.data()[i], cumulative = std::erfc(-v / std::sqrt(2.0L)) / 2;
        const long double density = std::exp(-v * v / 2) / std::sqrt(2 * std::numbers::pi_v<long double>);
        const auto close = [](T got, long double want) {
            return std::abs(got / want - 1) <= 8 * std::numeric_limits<T>::epsilon();
        };
        CAPTURE(v);
        CHECK(close(y.data()[i], v * cumulative));
        CHECK(close(slope.data()[i], cumulative + v * density));
    }
    CHECK(y.data()[6] == T(0));
    CHECK(slope.data()[6] == T(0));
    CHECK(y.data()[7] == infinity);
    CHECK(slope.data()[7] == T(1));
}

TEST_CASE("gelu: backward agrees with finite differences") {
    const Cpu policy(1);
    auto x = normal<double>(policy, std::array<Index, 2>{5, 19}, 0, 2.0);
    const auto d_y = normal<double>(policy, x.shape(), 1);
    auto d_x = copy_of(policy, d_y);
    gelu_vjp(policy, d_x, x);
    const auto expected = finite_differences(policy, x, [&] { return inner(d_y, gelu_forward(policy, x)); });
    CHECK(relative_error(d_x, expected) <= 1e-8);
}
