// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/route_blocks.hpp>

namespace colt5 {

namespace cuda {

/// One block of threads for each sample.
template <typename Index32>
__global__ void block_shares(RouteBlocks blocks, Index32* lengths, Index32* picks, const bool* mask) {
    const Index sample = blockIdx.x, count = blocks.count();
    Index end = 0;
    for (Index i = threadIdx.x; i < blocks.length; i += blockDim.x)
        if (mask[sample * blocks.length + i]) end = i + 1;
    end = block_reduce(end, Index{0}, Greater());
    const auto share = static_cast<Index32>(blocks.of_sample(end).picks_of_block());
    for (Index j = threadIdx.x; j < count; j += blockDim.x) picks[sample * count + j] = share;
    if (threadIdx.x == 0) lengths[sample] = static_cast<Index32>(end);
}

/// `total` is the number of picks of all samples and routes.
template <typename T>
__global__ void merge_blocks(RouteBlocks blocks, Index routes, Index total, TokenIndex* indices, T* scores,
                             const TokenIndex* block_indices, const T* block_scores, const TokenIndex* lengths) {
    for (Index to = global_thread(); to < total; to += grid_threads()) {
        const Index i = to % blocks.picks, row = to / blocks.picks;  // b · routes + route
        const RouteBlocks mine = blocks.of_sample(lengths, row / routes);
        if (i >= mine.picks) {
            indices[to] = static_cast<TokenIndex>(i);  // the sample has i tokens or fewer
            scores[to] = T(0);
            continue;
        }
        const Index block = mine.block_of(i);
        const Index from = ((row / routes * blocks.count() + block) * routes + row % routes) * blocks.picks_of_block() +
                           i - mine.first_pick(block);
        const Index token = block_indices[from] + block * blocks.size;
        indices[to] = static_cast<TokenIndex>(::min(token, blocks.length - 1));
        scores[to] = block_scores[from];
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

/// `total` is the number of picks of all blocks and routes.
template <typename T>
__global__ void split_blocks(RouteBlocks blocks, Index routes, Index total, T* block_scores, const T* scores,
                             const TokenIndex* lengths) {
    const Index count = blocks.count(), each = blocks.picks_of_block();
    for (Index place = global_thread(); place < total; place += grid_threads()) {
        const Index route = place / each % routes, row = place / each / routes;  // b · blocks + block
        const RouteBlocks mine = blocks.of_sample(lengths, row / count);
        const Index i = mine.first_pick(row % count) + place % each;
        block_scores[place] =
            i < mine.first_pick(row % count + 1) ? scores[(row / count * routes + route) * blocks.picks + i] : T(0);
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

template <std::same_as<TokenIndex> Integer>
void block_shares_kernel(const Cuda& policy, const RouteBlocks& blocks, VectorView<Integer> lengths,
                         VectorView<TokenIndex> picks, Mask mask) {
    cuda::launch(policy, "block_shares", cuda::block_shares<TokenIndex>, cuda::grid(mask.extent(0)),
                 cuda::route_blocks_threads, 0, blocks, lengths.data(), picks.data(), mask.data());
}

template <typename T>
void merge_blocks_kernel(const Cuda& policy, const RouteBlocks& blocks, TokensView<TokenIndex> indices,
                         TokensView<T> scores, TokensView<const TokenIndex> block_indices,
                         TokensView<const T> block_scores, VectorView<const TokenIndex> lengths) {
    cuda::launch(policy, "merge_blocks", cuda::merge_blocks<T>,
                 cuda::blocks_for(indices.size(), cuda::route_blocks_threads), cuda::route_blocks_threads, 0, blocks,
                 indices.extent(1), indices.size(), indices.data(), scores.data(), block_indices.data(),
                 block_scores.data(), lengths.data());
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
                         TokensView<const T> scores, VectorView<const TokenIndex> lengths) {
    cuda::launch(policy, "split_blocks", cuda::split_blocks<T>,
                 cuda::blocks_for(block_scores.size(), cuda::route_blocks_threads), cuda::route_blocks_threads, 0,
                 blocks, block_scores.extent(1), block_scores.size(), block_scores.data(), scores.data(),
                 lengths.data());
}

}  // namespace colt5
