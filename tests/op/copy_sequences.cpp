// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <vector>

#include <colt5/cpu/copy_sequences.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

TEST_CASE_TEMPLATE("copy_sequences: sequences as a batch, and back", T, float, double, bfloat16) {
    const Cpu policy(2);
    const std::vector<Index> firsts{12, 0, 7};
    for (const Index length : {0, 1, 4}) {
        CAPTURE(length);
        HostTensor<T, 2> all(policy, {16, 5}), back(policy, {16, 5});
        fill_with(policy, all, [](std::size_t i) { return static_cast<T>(static_cast<float>(i) + 1); });
        fill_with(policy, back, [](std::size_t) { return static_cast<T>(0.0f); });
        HostTensor<T, 3> part(policy, {3, length, 5});
        gather_sequences(policy, part.view(), all.const_view(), firsts);
        scatter_sequences(policy, back.view(), part.const_view(), firsts);
        for (Index row = 0; row < 16; ++row)
            for (Index j = 0; j < 5; ++j) {
                float expected = 0;
                for (std::size_t i = 0; i < firsts.size(); ++i)
                    if (row >= firsts[i] && row < firsts[i] + length) {
                        expected = static_cast<float>(all.const_view()(row, j));
                        CHECK(static_cast<float>(part.const_view()(static_cast<Index>(i), row - firsts[i], j)) ==
                              expected);
                    }
                CHECK(static_cast<float>(back.const_view()(row, j)) == expected);
            }
    }
}

TEST_CASE("copy_sequences: wrong arguments are named") {
    const Cpu policy(1);
    HostTensor<float, 2> all(policy, {16, 5});
    HostTensor<float, 3> part(policy, {2, 4, 5}), wide(policy, {2, 4, 6});
    const auto check = [&](const std::vector<Index>& firsts, const char* message) {
        CHECK_THROWS_WITH_AS(gather_sequences(policy, part.view(), all.const_view(), firsts), message, ValueError);
        CHECK_THROWS_WITH_AS(scatter_sequences(policy, all.view(), part.const_view(), firsts), message, ValueError);
    };
    check({0}, "colt5: `firsts` must be one row for each sequence, but is 1");
    check({0, 13}, "colt5: `firsts` must be rows from which on a sequence lies in all rows, but is 13");
    check({-1, 4}, "colt5: `firsts` must be rows from which on a sequence lies in all rows, but is -1");
    CHECK_THROWS_AS(gather_sequences(policy, wide.view(), all.const_view(), std::vector<Index>{0, 4}), ShapeError);
}
