// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/map_tokens.hpp>

namespace colt5 {

namespace cuda {

/// A thread takes one frequency of one token, of all maps.
template <typename T>
__global__ void add_sincos(T* tokens, WindowGrid grid, Index batch, Index quarter, Index count) {
    for (Index i = global_thread(); i < count; i += grid_threads()) {
        const Index token = quotient(i, quarter), c = i - token * quarter;
        const MapPosition at = grid.position(token);
        const double frequency = colt5::detail::sincos_frequency(c, quarter);
        double values[4];
        ::sincos(static_cast<double>(at.x) * frequency, &values[0], &values[1]);
        ::sincos(static_cast<double>(at.y) * frequency, &values[2], &values[3]);
        for (Index b = 0; b < batch; ++b) {
            T* const to = tokens + (b * grid.tokens() + token) * 4 * quarter + c;
            for (int part = 0; part < 4; ++part) {
                using Sum = accumulate_t<T>;
                T& value = to[part * quarter];
                value = static_cast<T>(static_cast<Sum>(value) + static_cast<Sum>(values[part]));
            }
        }
    }
}

/// The tokens that a block of the mean takes: by their number alone, so that a map's sums are the same in any batch.
struct MeanShares {
    static constexpr int groups = 8;
    Index tokens_each, shares;
    explicit MeanShares(Index tokens)
        : tokens_each(std::max(Index{64}, divide_up(tokens, 256))), shares(divide_up(tokens, tokens_each)) {}
};

/// partial[b, share, column] = Σ over the real tokens of a share. A block has 32 columns and 8 groups of tokens.
template <typename T>
__global__ void sum_map(accumulate_t<T>* partial, const T* tokens, WindowGrid grid, Index dim, MeanShares shares,
                        Index blocks_each) {
    using Sum = accumulate_t<T>;
    __shared__ Sum shared[MeanShares::groups][warp_size];
    const RowBlock at(blocks_each);  // the row is a map
    const Index column_blocks = divide_up(dim, warp_size), share = quotient(at.block, column_blocks);
    const int lane = lane_id(), group = static_cast<int>(threadIdx.x) / warp_size;
    const Index column = (at.block - share * column_blocks) * warp_size + lane;
    const Index end = ::min(grid.tokens(), (share + 1) * shares.tokens_each);
    Sum sum = 0;
    if (column < dim)
        for (Index token = share * shares.tokens_each + group; token < end; token += MeanShares::groups)
            if (grid.contains(grid.position(token)))
                sum += static_cast<Sum>(tokens[(at.row * grid.tokens() + token) * dim + column]);
    shared[group][lane] = sum;
    __syncthreads();
    if (group != 0 || column >= dim) return;
    for (int g = 1; g < MeanShares::groups; ++g) sum += shared[g][lane];
    partial[(at.row * shares.shares + share) * dim + column] = sum;
}
/// mean[b, column] = Σ over the shares / number of tokens
template <typename T>
__global__ void mean_of_shares(T* mean, const accumulate_t<T>* partial, Index shares, Index dim, Index tokens,
                               Index count) {
    for (Index i = global_thread(); i < count; i += grid_threads()) {
        const Index b = quotient(i, dim), column = i - b * dim;
        accumulate_t<T> sum = 0;
        for (Index share = 0; share < shares; ++share) sum += partial[(b * shares + share) * dim + column];
        mean[i] = static_cast<T>(sum / static_cast<accumulate_t<T>>(tokens));
    }
}

template <typename T>
__global__ void spread_mean(T* d_tokens, const T* d_mean, WindowGrid grid, Index dim, Index count) {
    using Sum = accumulate_t<T>;
    const Sum tokens = static_cast<Sum>(grid.height * grid.width);
    for (Index i = global_thread(); i < count; i += grid_threads()) {
        const Index row = quotient(i, dim), b = quotient(row, grid.tokens());
        const bool real = grid.contains(grid.position(row - b * grid.tokens()));
        d_tokens[i] = real ? static_cast<T>(static_cast<Sum>(d_mean[b * dim + i - row * dim]) / tokens) : T(0);
    }
}

}  // namespace cuda

template <typename T>
void add_sincos_positions_kernel(const Cuda& policy, TokensView<T> tokens, const WindowGrid& grid) {
    constexpr int threads = 256;
    const Index quarter = tokens.extent(2) / 4, count = grid.tokens() * quarter;
    cuda::launch(policy, "add_sincos", cuda::add_sincos<T>, cuda::blocks_for(count, threads), threads, 0, tokens.data(),
                 grid, tokens.extent(0), quarter, count);
}

template <typename T>
void map_mean_kernel(const Cuda& policy, TokensView<T> mean, TokensView<const T> tokens, const WindowGrid& grid) {
    constexpr int threads = 256;
    const Index batch = tokens.extent(0), dim = tokens.extent(2);
    const cuda::MeanShares shares(grid.tokens());
    TokensTensor<accumulate_t<T>, Cuda> partial(policy, {batch, shares.shares, dim});
    const Index blocks = shares.shares * divide_up(dim, cuda::warp_size);
    cuda::launch(policy, "sum_map", cuda::sum_map<T>, cuda::grid_of_rows(batch, blocks),
                 cuda::MeanShares::groups * cuda::warp_size, 0, partial.data(), tokens.data(), grid, dim, shares,
                 blocks);
    cuda::launch(policy, "mean_of_shares", cuda::mean_of_shares<T>, cuda::blocks_for(mean.size(), threads), threads, 0,
                 mean.data(), partial.data(), shares.shares, dim, grid.height * grid.width, mean.size());
}

template <typename T>
void map_mean_vjp_kernel(const Cuda& policy, TokensView<T> d_tokens, TokensView<const T> d_mean,
                         const WindowGrid& grid) {
    constexpr int threads = 256;
    cuda::launch(policy, "spread_mean", cuda::spread_mean<T>, cuda::blocks_for(d_tokens.size(), threads), threads, 0,
                 d_tokens.data(), d_mean.data(), grid, d_tokens.extent(2), d_tokens.size());
}

}  // namespace colt5
