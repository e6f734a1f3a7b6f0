// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>

#include <colt5/cpu/policy.hpp>
#include <colt5/op/route_blocks.hpp>

namespace colt5 {

template <std::same_as<TokenIndex> Integer>
void block_shares_kernel(const Cpu&, const RouteBlocks& blocks, VectorView<Integer> lengths,
                         VectorView<TokenIndex> picks, Mask mask) {
    const Index count = blocks.count();
    for (Index b = 0; b < mask.extent(0); ++b) {
        Index length = blocks.length;
        while (length > 0 && !mask(b, length - 1)) --length;
        lengths[b] = static_cast<TokenIndex>(length);
        std::fill_n(picks.data() + b * count, count,
                    static_cast<TokenIndex>(blocks.of_sample(length).picks_of_block()));
    }
}

template <typename T>
void merge_blocks_kernel(const Cpu&, const RouteBlocks& blocks, TokensView<TokenIndex> indices, TokensView<T> scores,
                         TokensView<const TokenIndex> block_indices, TokensView<const T> block_scores,
                         VectorView<const TokenIndex> lengths) {
    const Index count = blocks.count();
    for (Index b = 0; b < indices.extent(0); ++b) {
        const RouteBlocks mine = blocks.of_sample(lengths.data(), b);
        for (Index r = 0; r < indices.extent(1); ++r)
            for (Index i = 0; i < blocks.picks; ++i) {
                if (i >= mine.picks) {
                    indices(b, r, i) = static_cast<TokenIndex>(i);  // the sample has i tokens or fewer
                    scores(b, r, i) = 0;
                    continue;
                }
                const Index j = mine.block_of(i), of_block = i - mine.first_pick(j);
                const Index place = block_indices(b * count + j, r, of_block) + j * blocks.size;
                indices(b, r, i) = static_cast<TokenIndex>(std::min(place, blocks.length - 1));
                scores(b, r, i) = block_scores(b * count + j, r, of_block);
            }
    }
}

template <typename T>
void merge_block_rows_kernel(const Cpu&, const RouteBlocks& blocks, TokensView<T> merged, TokensView<const T> x) {
    const Index count = blocks.count();
    for (Index b = 0; b < merged.extent(0); ++b)
        for (Index r = 0; r < merged.extent(1); ++r)
            for (Index j = 0, first = 0; j < count; ++j, first += blocks.size)
                std::copy_n(x[b * count + j][r].data(), std::min(blocks.size, blocks.length - first),
                            merged[b][r].data() + first);
}

template <typename T>
void pad_sequences_kernel(const Cpu&, TokensView<T> padded, TokensView<const T> x, Index length) {
    const Index row = padded.extent(2), filled = length * row;
    for (Index b = 0; b < padded.extent(0); ++b) {
        T* const out = padded.data() + b * padded.extent(1) * row;
        if (x)
            std::copy_n(x.data() + b * filled, filled, out);
        else
            std::fill_n(out, filled, T(1));
        std::fill_n(out + filled, padded.extent(1) * row - filled, T(0));
    }
}

template <typename T>
void split_blocks_kernel(const Cpu&, const RouteBlocks& blocks, TokensView<T> block_scores, TokensView<const T> scores,
                         VectorView<const TokenIndex> lengths) {
    const Index count = blocks.count();
    std::fill_n(block_scores.data(), block_scores.size(), T(0));
    for (Index b = 0; b < scores.extent(0); ++b) {
        const RouteBlocks mine = blocks.of_sample(lengths.data(), b);
        for (Index r = 0; r < scores.extent(1); ++r)
            for (Index i = 0; i < mine.picks; ++i) {
                const Index j = mine.block_of(i);
                block_scores(b * count + j, r, i - mine.first_pick(j)) = scores(b, r, i);
            }
    }
}

}  // namespace colt5
