// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cpu/policy.hpp>
#include <colt5/op/route_blocks.hpp>

namespace colt5 {

template <typename T>
void merge_blocks_kernel(const Cpu&, const RouteBlocks& blocks, TokensView<TokenIndex> indices, TokensView<T> scores,
                         TokensView<const TokenIndex> block_indices, TokensView<const T> block_scores) {
    const Index count = blocks.count();
    for (Index b = 0; b < indices.extent(0); ++b)
        for (Index r = 0; r < indices.extent(1); ++r)
            for (Index j = 0; j < count; ++j)
                for (Index first = blocks.first_pick(j), i = first; i < blocks.first_pick(j + 1); ++i) {
                    const auto place = block_indices(b * count + j, r, i - first) + j * blocks.size;
                    indices(b, r, i) = static_cast<TokenIndex>(std::min(place, blocks.length - 1));
                    scores(b, r, i) = block_scores(b * count + j, r, i - first);
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
void split_blocks_kernel(const Cpu&, const RouteBlocks& blocks, TokensView<T> block_scores,
                         TokensView<const T> scores) {
    const Index count = blocks.count();
    std::fill_n(block_scores.data(), block_scores.size(), T(0));
    for (Index b = 0; b < scores.extent(0); ++b)
        for (Index r = 0; r < scores.extent(1); ++r)
            for (Index j = 0; j < count; ++j)
                for (Index first = blocks.first_pick(j), i = first; i < blocks.first_pick(j + 1); ++i)
                    block_scores(b * count + j, r, i - first) = scores(b, r, i);
}

}  // namespace colt5
