// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <cmath>

#include <colt5/cpu/expr.hpp>
#include <colt5/op/softmax.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

TEST_CASE("softmax: agrees with a loop, also far from zero") {
    const Cpu policy(2);
    for (const double deviation : {1.0, 300.0}) {
        for (const Index columns : {1, 3, 16, 67}) {
            const auto x = normal<double>(policy, std::array<Index, 3>{2, 5, columns}, 0, deviation);
            auto expected = tensor_like(policy, x);
            for (Index row = 0; row < 10; ++row) {
                double largest = x.view().rows()(row, 0), sum = 0;
                for (Index j = 0; j < columns; ++j) largest = std::max(largest, x.view().rows()(row, j));
                for (Index j = 0; j < columns; ++j) sum += std::exp(x.view().rows()(row, j) - largest);
                for (Index j = 0; j < columns; ++j)
                    expected.view().rows()(row, j) = std::exp(x.view().rows()(row, j) - largest) / sum;
            }
            CHECK(relative_error(softmax(policy, x), expected) <= 1e-12);
        }
    }
}

TEST_CASE("softmax: backward agrees with finite differences") {
    const Cpu policy(1);
    auto x = normal<double>(policy, std::array<Index, 2>{4, 9}, 0);
    const auto d_y = normal<double>(policy, x.shape(), 1);
    const auto d_x = softmax_vjp(policy, d_y, softmax(policy, x));
    CHECK(relative_error(d_x, finite_differences(policy, x, [&] { return inner(d_y, softmax(policy, x)); })) <= 1e-8);
}
