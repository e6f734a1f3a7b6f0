// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <cmath>

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

TEST_CASE("gelu: backward agrees with finite differences") {
    const Cpu policy(1);
    auto x = normal<double>(policy, std::array<Index, 2>{5, 19}, 0, 2.0);
    const auto d_y = normal<double>(policy, x.shape(), 1);
    auto d_x = copy_of(policy, d_y);
    gelu_vjp(policy, d_x, x);
    const auto expected = finite_differences(policy, x, [&] { return inner(d_y, gelu_forward(policy, x)); });
    CHECK(relative_error(d_x, expected) <= 1e-8);
}
