// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>

#include <colt5/cpu/expr.hpp>
#include <colt5/cpu/route_blocks.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

TEST_CASE("RouteBlocks: shares of exactly k picks, none larger than its block or than picks_of_block") {
    for (Index length = 1; length <= 40; ++length)
        for (Index size = 1; size <= length; ++size)
            for (Index k = 0; k <= length; ++k) {
                const RouteBlocks blocks{length, size, k};
                REQUIRE(blocks.first_pick(0) == 0);
                REQUIRE(blocks.first_pick(blocks.count()) == k);
                for (Index j = 0; j < blocks.count(); ++j) {
                    const Index picks = blocks.first_pick(j + 1) - blocks.first_pick(j);
                    REQUIRE(picks >= 0);
                    REQUIRE(picks <= blocks.picks_of_block());
                    REQUIRE(picks <= std::min(size, length - j * size));
                }
            }
    const RouteBlocks long_row{Index{1} << 30, Index{1} << 20, Index{1} << 29};
    CHECK(long_row.first_pick(512) == Index{1} << 28);
}

TEST_CASE("merge_blocks, split_blocks: picks of blocks as picks of the sequence, and back") {
    const Cpu policy(1);
    const RouteBlocks blocks{10, 4, 5};  // shares 2, 2 and 1
    REQUIRE(blocks.picks_of_block() == 2);
    HostTensor<TokenIndex, 3> indices(policy, {6, 1, 2});
    HostTensor<float, 3> scores(policy, {6, 1, 2});
    for (Index i = 0; i < 12; ++i) {
        indices.data()[i] = static_cast<TokenIndex>(i % 4);
        scores.data()[i] = static_cast<float>(i);
    }
    const auto merged = merge_blocks(policy, blocks, 2, indices, scores);
    const std::array<TokenIndex, 10> expected{0, 1, 6, 7, 8, 2, 3, 4, 5, 9};
    const std::array<float, 10> expected_scores{0, 1, 2, 3, 4, 6, 7, 8, 9, 10};
    // the indices that are i mod 4 are 0 1 | 2 3 | 0 1 and 2 3 | 0 1 | 2 3, counted from the starts 0, 4 and 8
    CHECK(std::equal(expected_scores.begin(), expected_scores.end(), merged.scores.data()));
    CHECK(std::equal(expected.begin(), expected.begin() + 9, merged.indices.data()));
    CHECK(merged.indices.data()[9] == 9);  // 8 + 2 is behind the sequence: its last token

    const auto split = split_blocks(policy, blocks, merged.scores);
    for (Index row = 0; row < 6; ++row)
        for (Index i = 0; i < 2; ++i)
            CHECK(split.const_view()(row, 0, i) == (row % 3 == 2 && i == 1 ? 0 : scores.const_view()(row, 0, i)));
    CHECK_THROWS_WITH_AS(merge_blocks(policy, blocks, 3, indices, scores),
                         "colt5: `indices` must have shape (9, any, 2), but has (6, 1, 2)", ShapeError);
    CHECK_THROWS_WITH_AS(split_blocks(policy, blocks, scores),
                         "colt5: `d_scores` must have shape (any, any, 5), but has (6, 1, 2)", ShapeError);
}

TEST_CASE("merge_block_rows: numbers of the tokens of each block, of those behind the sequence none") {
    const Cpu policy(1);
    for (const RouteBlocks& blocks : {RouteBlocks{10, 4, 5}, {8, 4, 1}, {3, 3, 1}, {5, 1, 2}, {0, 1, 0}}) {
        const auto x = normal<double>(policy, std::array<Index, 3>{2 * blocks.count(), 3, blocks.size}, 0);
        const auto merged = merge_block_rows(policy, blocks, 2, x);
        REQUIRE(merged.shape() == std::array<Index, 3>{2, 3, blocks.length});
        for (Index b = 0; b < 2; ++b)
            for (Index r = 0; r < 3; ++r)
                for (Index i = 0; i < blocks.length; ++i)
                    CHECK(merged.const_view()(b, r, i) ==
                          x.const_view()(b * blocks.count() + i / blocks.size, r, i % blocks.size));
    }
    const auto x = normal<double>(policy, std::array<Index, 3>{6, 3, 4}, 0);
    CHECK_THROWS_WITH_AS(merge_block_rows(policy, RouteBlocks{10, 5, 1}, 2, x),
                         "colt5: `x` must have shape (4, any, 5), but has (6, 3, 4)", ShapeError);
}

TEST_CASE("pad_sequences: rows of zeros behind each sequence, or ones before them") {
    const Cpu policy(1);
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 3, 4}, 0);
    auto padded = filled<float>(policy, std::array<Index, 3>{2, 5, 4}, 7),
         ones = filled<float>(policy, padded.shape(), 7);
    pad_sequences(policy, padded.view(), x.const_view(), 3);
    pad_sequences(policy, ones.view(), TokensView<const float>(), 3);
    for (Index b = 0; b < 2; ++b)
        for (Index i = 0; i < 5; ++i)
            for (Index j = 0; j < 4; ++j) {
                CHECK(padded.const_view()(b, i, j) == (i < 3 ? x.const_view()(b, i, j) : 0));
                CHECK(ones.const_view()(b, i, j) == (i < 3 ? 1 : 0));
            }
    CHECK_THROWS_WITH_AS(pad_sequences(policy, padded.view(), x.const_view(), 4),
                         "colt5: `x` must have shape (2, 4, 4), but has (2, 3, 4)", ShapeError);
    CHECK_THROWS_WITH_AS(pad_sequences(policy, padded.view(), TokensView<const float>(), 6),
                         "colt5: `length` must be at most the length of `padded`, but is 6", ValueError);
}
