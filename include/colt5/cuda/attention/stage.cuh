// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention/mask.cuh>
#include <colt5/cuda/attention/tuning.cuh>

/// Stages: streamed rows in shared memory, and the groups of 16 of them that a warp processes.
namespace colt5::cuda {

/// One stage. `first` and `second` hold keys and values, or queries and gradients of the output. `of_row` holds
/// `numbers` numbers for each row: the value scale, or for the key gradient the shift and D of a query.
template <typename Tile, typename Sum, int rows, int numbers>
struct alignas(16) StagingBuffer {  // rows are copied in 16 bytes
    typename Tile::T first[rows * Tile::stride], second[rows * Tile::stride];
    Sum of_row[numbers][rows];
    /// stream_keys writes it if it slides, if there is a mask, or if the key range ends before the stage is full.
    Visibility<rows> visible;
};

/// The types and sizes of a kernel. `numbers` is how many numbers come with each streamed row.
template <typename Arithmetic_, int width_, Staging staging, AttentionTuning tuning, int numbers>
struct KernelShape {
    using Arithmetic = Arithmetic_;
    using T = typename Arithmetic::Scalar;
    using Sum = typename Arithmetic::Sum;
    using Tile = cuda::Tile<Arithmetic, width_>;
    static constexpr bool slides = staging == Staging::sliding, picked = staging == Staging::picked;
    static constexpr int width = width_, warps = tuning.warps, tile_rows = 16 * warps, threads = warp_size * warps;
    static constexpr int stage_rows = tuning.stage_rows, stages = tuning.stages;
    static constexpr int tile_buffers = slides ? 2 : 1;  // a tile is loaded while that before it is processed
    static constexpr int groups_at_once = tuning.groups_at_once;
    static constexpr int blocks_per_multiprocessor = tuning.blocks_per_multiprocessor;
    static constexpr bool left_is_resident = tuning.left_is_resident;
    using Stage = StagingBuffer<Tile, Sum, stage_rows, numbers>;
};

/// Starts copying one of the block's own tiles.
template <typename Shape, typename From>
__device__ void load_tile_rows(typename Shape::T* tile, const From& from, int first, int limit,
                               const Attention<typename Shape::T>& a) {
    if constexpr (Shape::slides)
        Shape::Tile::template load_whole<Shape::threads, Shape::tile_rows>(tile, from, first, limit, a.dim_head);
    else
        Shape::Tile::template load<Shape::threads>(tile, from, first, Shape::tile_rows, limit, a.dim_head, a.vectors);
}

/// A group of 16 streamed rows: its stage, and its first row in it.
template <typename Stage>
struct Group {
    const Stage& stage;
    int row;
};

/// The key range of 16 rows, from `first` on, within one stage, in groups of 16 streamed rows. The stage starts at row
/// `stage_first`, has room for `size` rows, and ends at row `limit` at the latest.
struct Groups {
    int begin, end;

    __device__ Groups(int first, int stage_first, int size, int limit, Reach reach)
        : begin(::max(0, first - reach.before - stage_first) / 16),
          end(::min(::min(size, limit - stage_first) + 15, first + reach.after - stage_first + 31) / 16) {}
};

/// The groups in reach of a warp's 16 rows of tile t, which begin at `position`. Groups are counted from `first_row`,
/// where streamed tile t − 1 begins. Without `rest` those in tile t − 1, with it those in tiles t and t + 1.
struct SlidingWindow : Groups {
    static constexpr int groups_per_tile = SlidingWindowTuning::rows / 16;

    __device__ SlidingWindow(int t, bool rest, int first_row, int position, Reach reach, int limit)
        : Groups(position, first_row, SlidingWindowTuning::stages * SlidingWindowTuning::rows, limit, reach),
          first(first_row),
          streamed(t - 1) {
        if (rest)
            begin = ::max(begin, groups_per_tile);
        else
            end = ::min(end, groups_per_tile);
    }
    /// Whether the three tiles reach beyond the sequence.
    __device__ bool is_incomplete(int limit) const {
        return first < 0 || first + SlidingWindowTuning::stages * SlidingWindowTuning::rows > limit;
    }
    /// A function that finds group i, counted from the first of the three tiles, in the ring of stages.
    template <typename Stage>
    __device__ auto groups_of(const Stage* stages) const {
        const int first_stage = (streamed + SlidingWindowTuning::stages) % SlidingWindowTuning::stages;
        return [stages, first_stage](int group) {
            const int at = first_stage + group / groups_per_tile;
            return Group<Stage>{stages[at < SlidingWindowTuning::stages ? at : at - SlidingWindowTuning::stages],
                                group % groups_per_tile * 16};
        };
    }
    int first, streamed;  // row, and number, of the first of the three tiles
};

}  // namespace colt5::cuda
