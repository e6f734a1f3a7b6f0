// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention_passing.cuh>
#include <colt5/cuda/attention_rows.cuh>

/// What the two kernels of attention's vector-Jacobian product share; see attention_backward.cuh.
namespace colt5::cuda {

/// What only backward reads and writes.
template <typename T>
struct AttentionGradients {
    using Sum = accumulate_t<T>;

    const T *out, *d_out;    // as Attention::out
    const Sum* log_sum_exp;  // (batch, heads, queries)
    Heads<T> d_q, d_k, d_v;  // assigned
    Sum* d_value_scale;      // (batch, heads, keys) or null: the share of each head
};

/// Two numbers for each query (batch, heads, queries), which the first kernel leaves to the second.
template <typename Sum>
struct QueryNumbers {
    Sum* shift;  // log_sum_exp in powers of two; ∞ for rows that saw no key, whose weights so are exp(s − ∞) = 0
    Sum* dot;  // D = out · d_out; for rows that see one key the dp of that key, so that ds = p (dp − D) is exactly 0
};

template <typename Sum>
__device__ Sum shift_of(Sum log_sum_exp) {
    constexpr Sum infinity = std::numeric_limits<Sum>::infinity();
    return log_sum_exp == -infinity ? infinity : log_sum_exp * static_cast<Sum>(log2_e);
}

/// The sizes of the kernel for d_q (one sum) or for d_k and d_v (two): each warp owns 16 queries or keys at a time, and
/// the others pass through shared memory.
template <typename Arithmetic_, int width_, Passing passing_mode, int sums>
struct BackwardShape {
    using Arithmetic = Arithmetic_;
    using T = typename Arithmetic::Scalar;
    using Sum = typename Arithmetic::Sum;
    using Tile = cuda::Tile<Arithmetic, width_>;
    static constexpr bool marches = passing_mode == Passing::marching, at_once = passing_mode == Passing::at_once;
    static constexpr int width = width_, row_bytes = width * sizeof(T);
    static constexpr int warps = row_bytes <= 512 ? 4 : 2;
    static constexpr int own = 16 * warps, threads = warp_size * warps, own_tiles = marches ? 2 : 1;
    static constexpr int in_turn = row_bytes <= 128 ? 64 : row_bytes <= 256 ? 32 : 16;
    static constexpr int passing = marches ? own : at_once ? window_rows<T>(own, 2 * own, Tile::stride) : in_turn;
    static constexpr int stages = marches ? marching_places : at_once || row_bytes > 256 ? 1 : 2;

    /// Registers of a thread for both left sides and for the sums.
    static constexpr int registers = row_bytes / 4 + sums * width / 2 * static_cast<int>(sizeof(Sum)) / 4;
    static constexpr bool left_is_resident = registers <= 160;
    static constexpr int blocks_per_multiprocessor = marches || (registers > 104 && registers <= 128) ? 2
                                                     : registers <= 104                               ? 3
                                                                                                      : 1;
    /// Groups of 16 passing rows at a time, for independent work behind the latency of each product.
    static constexpr int chunk = marches || (at_once && sums == 2 && registers <= 128) ? 2 : 1;

    using Stage = PassingStage<Tile, Sum, passing, 2>;
    struct Shared {
        T first[own_tiles][own * Tile::stride], second[own_tiles][own * Tile::stride];
        Sum of_row[own];
        Stage stage[stages];
    };
};

}  // namespace colt5::cuda
