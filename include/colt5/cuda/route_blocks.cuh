// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/route_blocks.hpp>

namespace colt5 {

namespace cuda {

/// The pick i of a block of a route of a sample, in (b · blocks, r, picks_of_block) and in (b, r, k).
struct BlockPick {
    Index block, of_block, of_sequence;
    bool is_left_out;

    __device__ BlockPick(const RouteBlocks& blocks, Index routes, Index place) : of_block(place) {
        const Index count = blocks.count(), each = blocks.picks_of_block();
        const Index i = place % each, route = place / each % routes, row = place / each / routes;
        block = row % count;
        const Index first = blocks.first_pick(block);
        is_left_out = first + i >= blocks.first_pick(block + 1);
        of_sequence = (row / count * routes + route) * blocks.picks + first + i;
    }
};

template <typename T>
__global__ void merge_blocks(RouteBlocks blocks, Index routes, Index total, TokenIndex* indices, T* scores,
                             const TokenIndex* block_indices, const T* block_scores) {
    for (Index place = global_thread(); place < total; place += grid_threads()) {
        const BlockPick pick(blocks, routes, place);
        if (pick.is_left_out) continue;
        const Index token = block_indices[place] + pick.block * blocks.size;
        indices[pick.of_sequence] = static_cast<TokenIndex>(::min(token, blocks.length - 1));
        scores[pick.of_sequence] = block_scores[place];
    }
}

/// merged (b, r, n) = x (b · blocks, r, size)
template <typename T>
__global__ void merge_block_rows(RouteBlocks blocks, Index routes, Index total, T* merged, const T* x) {
    for (Index place = global_thread(); place < total; place += grid_threads()) {
        const Index token = place % blocks.length, row = place / blocks.length;  // b · routes + route
        const Index block = row / routes * blocks.count() + token / blocks.size;
        merged[place] = x[(block * routes + row % routes) * blocks.size + token % blocks.size];
    }
}

template <typename T>
__global__ void split_blocks(RouteBlocks blocks, Index routes, Index total, T* block_scores, const T* scores) {
    for (Index place = global_thread(); place < total; place += grid_threads()) {
        const BlockPick pick(blocks, routes, place);
        block_scores[place] = pick.is_left_out ? T(0) : scores[pick.of_sequence];
    }
}

/// Entries of a sequence: `filled` of `each` are those of x, or 1 without x; the rest is 0.
template <typename T>
__global__ void pad_sequences(T* padded, const T* x, Index each, Index filled, Index total) {
    for (Index place = global_thread(); place < total; place += grid_threads()) {
        const Index sample = place / each, i = place - sample * each;
        padded[place] = i >= filled ? T(0) : x == nullptr ? T(1) : x[sample * filled + i];
    }
}

inline constexpr int route_blocks_threads = 256;

}  // namespace cuda

template <typename T>
void merge_blocks_kernel(const Cuda& policy, const RouteBlocks& blocks, TokensView<TokenIndex> indices,
                         TokensView<T> scores, TokensView<const TokenIndex> block_indices,
                         TokensView<const T> block_scores) {
    cuda::launch(policy, "merge_blocks", cuda::merge_blocks<T>,
                 cuda::blocks_for(block_indices.size(), cuda::route_blocks_threads), cuda::route_blocks_threads, 0,
                 blocks, block_indices.extent(1), block_indices.size(), indices.data(), scores.data(),
                 block_indices.data(), block_scores.data());
}

template <typename T>
void merge_block_rows_kernel(const Cuda& policy, const RouteBlocks& blocks, TokensView<T> merged,
                             TokensView<const T> x) {
    cuda::launch(policy, "merge_block_rows", cuda::merge_block_rows<T>,
                 cuda::blocks_for(merged.size(), cuda::route_blocks_threads), cuda::route_blocks_threads, 0, blocks,
                 merged.extent(1), merged.size(), merged.data(), x.data());
}

template <typename T>
void pad_sequences_kernel(const Cuda& policy, TokensView<T> padded, TokensView<const T> x, Index length) {
    cuda::launch(policy, "pad_sequences", cuda::pad_sequences<T>,
                 cuda::blocks_for(padded.size(), cuda::route_blocks_threads), cuda::route_blocks_threads, 0,
                 padded.data(), x.data(), padded.extent(1) * padded.extent(2), length * padded.extent(2),
                 padded.size());
}

template <typename T>
void split_blocks_kernel(const Cuda& policy, const RouteBlocks& blocks, TokensView<T> block_scores,
                         TokensView<const T> scores) {
    cuda::launch(policy, "split_blocks", cuda::split_blocks<T>,
                 cuda::blocks_for(block_scores.size(), cuda::route_blocks_threads), cuda::route_blocks_threads, 0,
                 blocks, block_scores.extent(1), block_scores.size(), block_scores.data(), scores.data());
}

}  // namespace colt5
