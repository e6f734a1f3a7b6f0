// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <colt5/cuda/attention/stage.cuh>

/// How attention kernels stream rows through shared memory.
///
/// Each block owns tiles of rows of one operand and streams the other operand's rows past them. The forward kernel and
/// the query gradient own queries and stream keys and values. The key gradient owns keys and values and streams queries
/// and gradients of the output. Streamed rows lie in staging buffers; warps process them in groups of 16.
namespace colt5::cuda {

/// Calls `run(std::integral_constant<int, count>(), group)` for `count` groups from `group` on: `at_once` of them in
/// each step, then the remaining ones one by one.
template <int at_once, typename Run>
__device__ void for_each_step(const Groups& groups, const Run& run) {
    int group = groups.begin;
    for (; group + at_once <= groups.end; group += at_once) run(std::integral_constant<int, at_once>(), group);
    if constexpr (at_once > 1)
        for (; group < groups.end; ++group) run(std::integral_constant<int, 1>(), group);
}

/// A software pipeline: compute(i) for i = 0 … count − 1, where load(i) starts the copies of step i into stage i %
/// stages and commits them as one group. The caller has called load(0). With two stages, step i + 1 is loaded during
/// compute(i).
template <int stages, typename Load, typename Compute>
__device__ void pipeline(int count, const Load& load, const Compute& compute) {
    for (int i = 0; i < count; ++i) {
        if (stages == 1 && i > 0) load(i);
        const bool more = stages > 1 && i + 1 < count;
        if (more) load(i + 1);
        if (more)
            wait_for_copies<1>();
        else
            wait_for_copies<0>();
        __syncthreads();
        compute(i);
        if (i + 1 < count) __syncthreads();
    }
}

/// A sliding window over tiles. A block owns `tiles` tiles of 64 rows. Its tile t is combined with the streamed tiles
/// t − 1, t and t + 1, each in a stage of its own. Tiles are numbered from the block's first tile, which is 0. Streamed
/// tile t − 1 is processed first, so that its stage can be refilled while t and t + 1 are processed. For each t it
/// calls
///
///     begin(t)            the rows of tile t have arrived
///     compute(t, false)   with streamed tile t − 1
///     compute(t, true)    with streamed tiles t and t + 1
///     end()
///
/// load_tile(t) starts the copies of the block's own tile t, which has buffer t % 2. load_stage(p) starts those of
/// streamed tile p, which has stage (p + 3) % 3. What load_stage(p) reads into registers, finish_stage(p) writes to the
/// stage. Tile t + 1 and streamed tile t + 2 are loaded during compute(t, true).
template <typename LoadTile, typename LoadStage, typename FinishStage, typename Begin, typename Compute, typename End>
__device__ void slide_window(int tiles, const LoadTile& load_tile, const LoadStage& load_stage,
                             const FinishStage& finish_stage, const Begin& begin, const Compute& compute,
                             const End& end) {
    load_tile(0);
    for (int p = -1; p <= 1; ++p) {
        load_stage(p);
        finish_stage(p);
    }
    end_copy_group();
    for (int t = 0; t < tiles; ++t) {
        wait_for_copies<0>();
        finish_stage(t + 1);
        __syncthreads();
        begin(t);
        compute(t, false);
        __syncthreads();
        if (t + 1 < tiles) {
            load_tile(t + 1);
            load_stage(t + 2);  // replaces t − 1
            end_copy_group();
        }
        compute(t, true);
        end();
    }
}

/// Streams keys and values past the queries of a block, which owns `tiles` tiles of them. It calls
///
///     load_queries(t)    starts copying tile t
///     begin(t)           the tile has arrived; returns the position, among the keys, of the warp's first query
///     process(group_at, groups, first_key, incomplete)
///                        accumulates over the groups with numbers in `groups`, each of 16 keys of one stage
///     end()              all keys in reach have been processed
///
/// Unless the window slides, only the first `keys` keys are streamed. `keys` may be more than a.keys (see
/// most_keys_seen); the rows beyond a.keys are then zeros that no query sees. group_at(i) finds group i, the 16 keys
/// from first_key + 16 i on. If `incomplete`, some keys of the groups may be masked or beyond the sequence, and
/// Visibility says which.
template <typename Shape, typename T, typename LoadQueries, typename Begin, typename Process, typename End>
__device__ void stream_keys(const Attention<T>& a, const AttentionBlock<T>& block, typename Shape::Stage* stages,
                            int tiles, int keys, const LoadQueries& load_queries, const Begin& begin,
                            const Process& process, const End& end) {
    using Stage = typename Shape::Stage;
    using Tile = typename Shape::Tile;
    using Sum = typename Shape::Sum;
    const int thread = static_cast<int>(threadIdx.x);
    const Reach reach = Reach::of_query(a);
    const auto k = block.template key_rows<Shape::picked>(a, a.k);
    const auto v = block.template key_rows<Shape::picked>(a, a.v);
    // The mask is read as bytes. A sliding window compares it in finish_stage, so as not to wait for the load here.
    const std::uint8_t* const mask = reinterpret_cast<const std::uint8_t*>(a.mask) + block.of_keys(a);
    const auto is_visible = [&](int key, int limit) {
        unsigned visible = key >= 0 && key < limit;
        if (a.mask != nullptr && visible != 0) visible = mask[key];
        return visible;
    };
    if constexpr (Shape::slides) {
        const auto first_key = [&](int p) { return a.first + block.first + p * Shape::stage_rows; };
        const auto stage_of = [&](int p) -> Stage& {
            return stages[(p + SlidingWindowTuning::stages) % SlidingWindowTuning::stages];
        };
        unsigned visible = 0;  // of this thread's key, until finish_stage writes it
        int position = 0;
        slide_window(
            ::min(tiles, (a.queries - block.first + Shape::tile_rows - 1) / Shape::tile_rows), load_queries,
            [&](int p) {
                Stage& stage = stage_of(p);
                const int at = first_key(p);
                Tile::template load_whole<Shape::threads, Shape::stage_rows>(stage.first, k, at, a.keys, a.dim_head);
                Tile::template load_whole<Shape::threads, Shape::stage_rows>(stage.second, v, at, a.keys, a.dim_head);
                if (thread < Shape::stage_rows) visible = is_visible(at + thread, a.keys);
            },
            [&](int p) {
                if (thread < Shape::stage_rows) stage_of(p).visible.set(thread, visible != 0);
            },
            [&](int t) { position = begin(t); },
            [&](int t, bool rest) {
                const SlidingWindow window(t, rest, first_key(t - 1), position, reach, a.keys);
                process(window.groups_of(stages), window, window.first,
                        a.mask != nullptr || window.is_incomplete(a.keys));
            },
            end);
    } else {
        const KeyRange range(a.first + block.first, Shape::tile_rows, reach, keys);
        const int limit = ::min(range.end, a.keys);
        const auto is_incomplete = [&](int i) {
            return a.mask != nullptr || range.begin + (i + 1) * Shape::stage_rows > limit;
        };
        const auto load = [&](int i) {
            Stage& stage = stages[i % Shape::stages];
            const int at = range.begin + i * Shape::stage_rows;
            const int rows = ::min(Shape::stage_rows, (range.end - at + 15) / 16 * 16);
            Tile::template load<Shape::threads>(stage.first, k, at, rows, limit, a.dim_head, a.vectors);
            Tile::template load<Shape::threads>(stage.second, v, at, rows, limit, a.dim_head, a.vectors);
            if (is_incomplete(i))
                for (int row = thread; row < (rows + 31) / 32 * 32; row += Shape::threads)
                    stage.visible.set(row, is_visible(at + row, limit) != 0);
            if (a.value_scale != nullptr)
                for (int row = thread; row < rows; row += Shape::threads)
                    stage.of_row[0][row] = at + row < limit ? a.value_scale[block.of_keys(a) + at + row] : Sum(0);
            end_copy_group();
        };
        load_queries(0);
        load(0);
        wait_for_copies<0>();
        __syncthreads();
        const int position = begin(0);
        pipeline<Shape::stages>(
            (range.end - range.begin + Shape::stage_rows - 1) / Shape::stage_rows, load, [&](int i) {
                const Stage& stage = stages[i % Shape::stages];
                const int at = range.begin + i * Shape::stage_rows;
                process(
                    [&](int group) {
                        return Group<Stage>{stage, 16 * group};
                    },
                    Groups(position, at, Shape::stage_rows, range.end, reach), at, is_incomplete(i));
            });
        end();
    }
}

}  // namespace colt5::cuda
