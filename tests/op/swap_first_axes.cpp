// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>

#include <colt5/cpu/swap_first_axes.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

TEST_CASE_TEMPLATE("swap_first_axes: rows sorted by the other axis, and back", T, float, double, TokenIndex, bool) {
    const Cpu policy(2);
    for (const auto& shape :
         {std::array<Index, 3>{1, 1, 1}, std::array<Index, 3>{2, 3, 5}, std::array<Index, 3>{7, 1, 2},
          std::array<Index, 3>{0, 3, 5}, std::array<Index, 3>{2, 3, 0}}) {
        HostTensor<T, 3> x(policy, shape);
        fill_with(policy, x, [](std::size_t i) { return i % 3; });
        const auto y = swap_first_axes(policy, x);
        REQUIRE(y.shape() == std::array{shape[1], shape[0], shape[2]});
        for (Index i = 0; i < shape[0]; ++i)
            for (Index j = 0; j < shape[1]; ++j)
                for (Index k = 0; k < shape[2]; ++k) CHECK(y.const_view()(j, i, k) == x.const_view()(i, j, k));
        CHECK(same_bits(swap_first_axes(policy, y), x));
    }
}

TEST_CASE_TEMPLATE("swap_middle_axes: swap_first_axes of each sample, and back", T, float, double) {
    const Cpu policy(2);
    for (const auto& shape :
         {std::array<Index, 4>{1, 1, 1, 1}, {3, 2, 5, 4}, {2, 7, 1, 3}, {2, 0, 3, 5}, {0, 2, 3, 5}}) {
        const auto x = normal<T>(policy, shape, 0);
        const auto y = swap_middle_axes(policy, x);
        REQUIRE(y.shape() == std::array{shape[0], shape[2], shape[1], shape[3]});
        for (Index b = 0; b < shape[0]; ++b) {
            const auto sample = x.const_view()[b];
            CHECK(to_host(policy, swap_first_axes(policy, sample)) == to_host(policy, y.const_view()[b]));
        }
        CHECK(same_bits(swap_middle_axes(policy, y), x));
    }
}
