// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cuda/attention/tile.cuh>

/// The sizes of the attention kernels, and why. Where the reason is a measurement, it was made on an H100 or H200.
namespace colt5::cuda {

enum class Staging {
    pipelined,    ///< stages of a few rows: with two of them, one is loaded while the other is processed. Rows over 256
                  ///< bytes have one stage
    picked,       ///< the same for keys that are picked rows
    large_stage,  ///< one large stage: the rows that a tile attends to, or as many as fit; further rows follow in it
    sliding       ///< a sliding window over tiles: a block has one or more tiles and loads each streamed tile once
};

/// Staging::sliding.
struct SlidingWindowTuning {
    /// Of a tile, and the largest reach. The window is then the tile and one on each side: reach and rows are equal, so
    /// that a tile needs no fourth one. Four warps have 16 rows each.
    static constexpr int rows = 64;
    /// The three tiles of a window, t − 1, t and t + 1. Tile t − 1 is processed first; its stage is refilled while the
    /// other two are processed, so that there is no fourth stage.
    static constexpr int stages = 3;
    /// A block has as many tiles as one wave of blocks needs for all of them. With 32, the two stages that
    /// neighbouring blocks both load are 1/16 of all loads; with more, fewer blocks would balance worse.
    static constexpr int most_tiles = 32;
};

/// The sizes of one kernel.
struct AttentionTuning {
    int warps;                      ///< of a block; each owns 16 rows of a tile
    int stage_rows;                 ///< streamed rows of a stage
    int stages;                     ///< stages in shared memory
    int groups_at_once;             ///< groups of 16 streamed rows in one step; the rest are processed one by one
    int blocks_per_multiprocessor;  ///< which the compiler makes room for in registers
    bool left_is_resident;          ///< whether the own rows stay in registers as operands of products
};

/// The rows of a large stage, a multiple of 16: a tile and 64 rows on each side of it, or as many as shared memory has
/// room for next to `fixed_rows` rows of the tile's own operands. A streamed row takes two rows of shared memory, one
/// in each operand, and its numbers.
template <typename T>
constexpr int large_stage_rows(int tile_rows, int fixed_rows, int stride) {
    constexpr int available = shared_bytes - 2048, numbers_bytes = 2 * static_cast<int>(sizeof(accumulate_t<T>)) + 1;
    const int row_bytes = stride * static_cast<int>(sizeof(T));
    return std::min(tile_rows + 128,
                    (available - fixed_rows * (row_bytes + 8)) / (2 * row_bytes + numbers_bytes) / 16 * 16);
}

/// Forward: a block owns queries (one operand) and streams keys and values.
template <typename Arithmetic, int width, Staging staging>
constexpr AttentionTuning forward_tuning() {
    using T = typename Arithmetic::Scalar;
    constexpr bool slides = staging == Staging::sliding, large = staging == Staging::large_stage;
    constexpr int row_bytes = width * static_cast<int>(sizeof(T));
    // Rows of 1024 bytes (double): two warps, because the accumulators of wide rows fill the registers, and shared
    // memory has room for few rows.
    constexpr int warps = row_bytes > 512 ? 2 : 4, tile_rows = 16 * warps;
    // A pipelined stage has 32 KiB of keys and values at most.
    constexpr int pipelined_rows = row_bytes <= 256 ? 64 : row_bytes <= 512 ? 32 : 16;
    constexpr int stage_rows = slides  ? tile_rows
                               : large ? large_stage_rows<T>(tile_rows, tile_rows, Tile<Arithmetic, width>::stride)
                                       : pipelined_rows;
    return {
        .warps = warps,
        .stage_rows = stage_rows,
        // Rows over 256 bytes: two stages leave no room for a second block of the multiprocessor.
        .stages = slides                     ? SlidingWindowTuning::stages
                  : large || row_bytes > 256 ? 1
                                             : 2,
        // All groups of a pipelined stage in one step of the softmax: fewer maxima and rescalings. A window of 64 rows
        // to either side has nine groups for a warp: three steps of three. Sliding has steps within one tile or two.
        .groups_at_once = slides  ? 2
                          : large ? 3
                                  : stage_rows / 16,
        // As measured; the shared memory of each leaves room for as many.
        .blocks_per_multiprocessor = slides            ? 3
                                     : row_bytes > 256 ? 1
                                     : row_bytes > 128 ? 2
                                                       : 4,
        .left_is_resident = true,  // the queries, for all steps
    };
}

/// Backward: a block owns queries and gradients of outputs, or keys and values (two operands), and streams the others.
/// `sums` is the number of accumulators: one for d_q, two for d_k and d_v.
template <typename Arithmetic, int width, Staging staging, int sums>
constexpr AttentionTuning backward_tuning() {
    using T = typename Arithmetic::Scalar;
    constexpr bool slides = staging == Staging::sliding, large = staging == Staging::large_stage;
    constexpr int row_bytes = width * static_cast<int>(sizeof(T));
    constexpr int warps = row_bytes <= 512 ? 4 : 2, tile_rows = 16 * warps;
    // Two operands of the tile are in shared memory, too: half the rows of the forward kernel for rows of 256 and 512
    // bytes.
    constexpr int pipelined_rows = row_bytes <= 128 ? 64 : row_bytes <= 256 ? 32 : 16;
    // Registers of a thread for both left operands and for the accumulators: they decide how many blocks run at the
    // same time, and whether left operands are read from shared memory in each step instead.
    constexpr int registers = row_bytes / 4 + sums * width / 2 * static_cast<int>(sizeof(typename Arithmetic::Sum)) / 4;
    return {
        .warps = warps,
        .stage_rows = slides  ? tile_rows
                      : large ? large_stage_rows<T>(tile_rows, 2 * tile_rows, Tile<Arithmetic, width>::stride)
                              : pipelined_rows,
        .stages = slides                     ? SlidingWindowTuning::stages
                  : large || row_bytes > 256 ? 1
                                             : 2,
        // Independent products hide each other's latency, where registers allow; as measured.
        .groups_at_once = slides || (large && sums == 2 && registers <= 128) ? 2 : 1,
        .blocks_per_multiprocessor = slides || (registers > 104 && registers <= 128) ? 2
                                     : registers <= 104                              ? 3
                                                                                     : 1,
        .left_is_resident = registers <= 160,
    };
}

}  // namespace colt5::cuda
