// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention_bias.cuh>
#include <colt5/cuda/attention_rows.cuh>

/// What the two kernels of the vector-Jacobian product of attention share; see attention_backward.cuh.
namespace colt5::cuda {

/// The operands of the backward kernels beyond those of Attention.
template <typename T>
struct AttentionGradients {
    using Sum = accumulate_t<T>;

    const T *out, *d_out;    // as Attention::out
    const Sum* log_sum_exp;  // (batch, heads, queries)
    Heads<T> d_q, d_k, d_v;  // assigned
    Sum* d_value_scale;      // (batch, heads, keys) or null: one gradient for each head, to be summed
};

/// Two numbers for each query (batch, heads, queries). The kernel for d_q writes them, the kernel for d_k and d_v reads
/// them.
template <typename Sum>
struct QueryNumbers {
    Sum* shift;  // log_sum_exp / ln 2; ∞ for a query without keys, so that its weights exp(s − ∞) are 0
    // D = out · d_out; for a query with a single key its dp, so that ds = p (dp − D) is exactly 0. With a bias, D is
    // corrected by Σ ds over the keys, which is the error that D has from the rounding of `out`: the gradient of a bias
    // sums ds of many queries, in which these errors would add up.
    Sum* dot;
};

template <typename Sum>
__device__ Sum shift_of(Sum log_sum_exp) {
    constexpr Sum infinity = std::numeric_limits<Sum>::infinity();
    return log_sum_exp == -infinity ? infinity : log_sum_exp * static_cast<Sum>(log2_e);
}

/// The products of `groups` groups from `group` on: p = first · stage.firstᵀ and d_p = second ·
/// stage.secondᵀ, where `at(i)` finds group i.
template <typename Tile, int groups, typename Sum, typename Left, typename At>
__device__ void multiply_groups(Sum (&p)[groups][2][4], Sum (&d_p)[groups][2][4], const Left& first, const Left& second,
                                const At& at, int group) {
#pragma unroll
    for (int c = 0; c < groups; ++c) {
        const auto [stage, row] = at(group + c);
        multiply_transposed(p[c], first, stage.first + row * Tile::stride);
        multiply_transposed(d_p[c], second, stage.second + row * Tile::stride);
    }
}

/// The sizes of the kernel for d_q (one accumulator), or of that for d_k and d_v (two). Each warp owns 16 queries or
/// keys at a time; the other operand is streamed through shared memory.
template <typename Arithmetic_, int width_, Staging staging, int sums>
struct BackwardShape {
    using Arithmetic = Arithmetic_;
    using T = typename Arithmetic::Scalar;
    using Sum = typename Arithmetic::Sum;
    using Tile = cuda::Tile<Arithmetic, width_>;
    static constexpr bool slides = staging == Staging::sliding, large_stage = staging == Staging::large_stage;
    static constexpr int width = width_, row_bytes = width * sizeof(T);
    static constexpr int warps = row_bytes <= 512 ? 4 : 2;
    static constexpr int tile_rows = 16 * warps, threads = warp_size * warps, tile_buffers = slides ? 2 : 1;
    static constexpr int pipelined_rows = row_bytes <= 128 ? 64 : row_bytes <= 256 ? 32 : 16;
    static constexpr int stage_rows = slides        ? tile_rows
                                      : large_stage ? window_rows<T>(tile_rows, 2 * tile_rows, Tile::stride)
                                                    : pipelined_rows;
    static constexpr int stages = slides ? sliding_stages : large_stage || row_bytes > 256 ? 1 : 2;

    /// Registers of a thread for both left operands and for the accumulators.
    static constexpr int registers = row_bytes / 4 + sums * width / 2 * static_cast<int>(sizeof(Sum)) / 4;
    static constexpr bool left_is_resident = registers <= 160;
    static constexpr int blocks_per_multiprocessor = slides || (registers > 104 && registers <= 128) ? 2
                                                     : registers <= 104                              ? 3
                                                                                                     : 1;
    /// Groups of 16 streamed rows that are processed together: independent products hide each other's latency.
    static constexpr int groups_at_once = slides || (large_stage && sums == 2 && registers <= 128) ? 2 : 1;

    using Stage = StagingBuffer<Tile, Sum, stage_rows, 2>;
    struct Shared {
        T first[tile_buffers][tile_rows * Tile::stride], second[tile_buffers][tile_rows * Tile::stride];
        Sum of_row[tile_rows];
        Stage stage[stages];
    };
};

}  // namespace colt5::cuda
