// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <colt5/cuda/attention_tile.cuh>

/// How the keys that queries see, or the queries that see keys, pass through shared memory: by groups of 16 rows.
namespace colt5::cuda {

/// How the rows of the other side pass through shared memory: blocks of them in turn, one stage ahead; the whole window
/// at once; or tiles on which a block of the kernel marches along, which reads each of them only once.
enum class Passing { in_turn, at_once, marching };

/// Rows of a tile, which a window must not reach beyond, and places for passing tiles.
inline constexpr int marching_rows = 64, marching_places = 3;

/// The part of [0, limit) that the tile [first, first + rows) sees, from a multiple of 16 on.
struct Sight {
    int begin, end;

    __device__ Sight(int first, int rows, int reach, int limit)
        : begin(::max(0, first - reach) / 16 * 16), end(::min(limit, first + rows + reach)) {}
};

/// The groups of 16 rows of a block of the other side, which starts at `block` and reaches at most to `limit`, that the
/// 16 rows from `first` on see.
struct Groups {
    int begin, end;

    __device__ Groups(int first, int block, int size, int limit, int reach)
        : begin(::max(0, first - reach - block) / 16),
          end(::min(::min(size, limit - block) + 15, first + reach - block + 31) / 16) {}
};

/// 16 rows of the other side: where they are in a stage of it.
template <typename Stage>
struct Group {
    const Stage& stage;
    int row;
};

/// Which rows of a stage are visible, a bit each.
template <int rows>
struct Visibility {
    std::uint32_t words[(rows + 31) / 32];

    /// Whole warps call it: `row` is visible if `visible`.
    __device__ void set(int row, bool visible) {
        const std::uint32_t word = __ballot_sync(0xffffffffu, visible);
        if (row % 32 == 0) words[row / 32] = word;
    }
    /// Of the 16 rows from `row`, a multiple of 16, on.
    __device__ std::uint32_t of_group(int row) const { return words[row / 32] >> row % 32 & 0xffffu; }
};
inline constexpr std::uint32_t whole_group = 0xffffu;

/// Rows of the other side in shared memory: keys and values, or queries and gradients of the output.
template <typename Tile, typename Sum, int rows, int numbers>
struct alignas(16) PassingStage {  // rows are copied in 16 bytes
    typename Tile::T first[rows * Tile::stride], second[rows * Tile::stride];
    Sum of_row[numbers][rows];
    Visibility<rows> visible;  // of keys, filled if there is a mask, or if keys begin or end in this block
};

/// How many rows of a window a kernel stages at once, as a multiple of 16: those of ±64 if they fit into
/// shared memory beside `fixed_rows` others. Rows come in pairs of tiles.
template <typename T>
constexpr int window_rows(int own, int fixed_rows, int stride) {
    constexpr int available = shared_bytes - 2048, beside = 2 * static_cast<int>(sizeof(accumulate_t<T>)) + 1;
    const int row_bytes = stride * static_cast<int>(sizeof(T));
    return std::min(own + 128, (available - fixed_rows * (row_bytes + 8)) / (2 * row_bytes + beside) / 16 * 16);
}

/// Calls `run(std::integral_constant<int, chunk>(), group)` for one chunk of groups after the other, then for single
/// ones.
template <int chunk, typename Run>
__device__ void for_each_chunk(const Groups& groups, const Run& run) {
    int group = groups.begin;
    for (; group + chunk <= groups.end; group += chunk) run(std::integral_constant<int, chunk>(), group);
    if constexpr (chunk > 1)
        for (; group < groups.end; ++group) run(std::integral_constant<int, 1>(), group);
}

/// Runs `compute(i)` for blocks 0 … blocks − 1 behind `load(i)`, which starts copies to stage i % stages and ends a
/// copy group. Block 0 must have arrived or be under way.
template <int stages, typename Load, typename Compute>
__device__ void pipeline(int blocks, const Load& load, const Compute& compute) {
    for (int i = 0; i < blocks; ++i) {
        if (stages == 1 && i > 0) load(i);
        const bool more = stages > 1 && i + 1 < blocks;
        if (more) load(i + 1);
        if (more)
            wait_for_copies<1>();
        else
            wait_for_copies<0>();
        __syncthreads();
        compute(i);
        if (i + 1 < blocks) __syncthreads();
    }
}

/// For `tiles` tiles of a block's own rows: begin(t), compute(t, false) with the passing tile t − 1, compute(t, true)
/// with t and t + 1, and end(), behind load_own(t) and load_passing(p) for the next ones, which start copies.
/// settle(p) puts in place what load_passing(p) has read otherwise. Passing tile p is at place (p + 3) % 3, a tile of
/// own rows at t % 2.
template <typename LoadOwn, typename LoadPassing, typename Settle, typename Begin, typename Compute, typename End>
__device__ void march(int tiles, const LoadOwn& load_own, const LoadPassing& load_passing, const Settle& settle,
                      const Begin& begin, const Compute& compute, const End& end) {
    load_own(0);
    for (int p = -1; p <= 1; ++p) {
        load_passing(p);
        settle(p);
    }
    end_copy_group();
    for (int t = 0; t < tiles; ++t) {
        wait_for_copies<0>();
        settle(t + 1);
        __syncthreads();
        begin(t);
        compute(t, false);
        __syncthreads();
        if (t + 1 < tiles) {
            load_own(t + 1);
            load_passing(t + 2);  // where t − 1 was
            end_copy_group();
        }
        compute(t, true);
        end();
    }
}

/// What 16 own rows at `position` see of the three passing tiles around tile t, of which the first begins at row
/// `first`: of that one, or of the `rest`.
struct MarchingWindow : Groups {
    static constexpr int of_tile = marching_rows / 16;

    __device__ MarchingWindow(int t, bool rest, int first_row, int position, int reach, int limit)
        : Groups(position, first_row, marching_places * marching_rows, limit, reach), first(first_row), place(t - 1) {
        if (rest)
            begin = ::max(begin, of_tile);
        else
            end = ::min(end, of_tile);
    }
    __device__ bool is_incomplete(int limit) const {
        return first < 0 || first + marching_places * marching_rows > limit;
    }
    template <typename Stage>
    __device__ auto groups_of(const Stage* stages) const {
        const int first_place = (place + marching_places) % marching_places;
        return [stages, first_place](int group) {
            const int at = first_place + group / of_tile;
            return Group<Stage>{stages[at < marching_places ? at : at - marching_places], group % of_tile * 16};
        };
    }
    int first, place;
};

/// Starts copying a tile of own rows.
template <typename Shape>
__device__ void load_own_rows(typename Shape::T* tile, const Rows<const typename Shape::T>& from, int first, int limit,
                              const Attention<typename Shape::T>& a) {
    if constexpr (Shape::marches)
        Shape::Tile::template load_whole<Shape::threads, Shape::own>(tile, from, first, limit, a.dim_head);
    else
        Shape::Tile::template load<Shape::threads>(tile, from, first, Shape::own, limit, a.dim_head, a.vectors);
}

/// Lets keys and values pass by the queries of a block of the kernel, which has `tiles` tiles of them:
///
///     load_queries(t)    starts copying tile t
///     begin(t)           its rows have arrived; returns where the warp's 16 queries are among the keys
///     see(at, groups, block_first, incomplete)
///                        the warp's queries see some groups of 16 keys
///     end()              they have seen them all
///
/// at(i) is the i-th group from the key block_first on; some keys of the groups are invisible only if `incomplete`.
template <typename Shape, typename T, typename LoadQueries, typename Begin, typename See, typename End>
__device__ void pass_keys(const Attention<T>& a, const AttentionBlock<T>& block, typename Shape::Stage* stages,
                          int tiles, const LoadQueries& load_queries, const Begin& begin, const See& see,
                          const End& end) {
    using Stage = typename Shape::Stage;
    using Tile = typename Shape::Tile;
    using Sum = typename Shape::Sum;
    const int thread = static_cast<int>(threadIdx.x);
    const Rows<const T> k = block.rows(a, a.k), v = block.rows(a, a.v);
    // As it is in memory: a comparison would wait for it.
    const std::uint8_t* const mask = reinterpret_cast<const std::uint8_t*>(a.mask) + block.of_keys(a);
    const auto is_visible = [&](int key, int limit) {
        unsigned visible = key >= 0 && key < limit;
        if (a.mask != nullptr && visible != 0) visible = mask[key];
        return visible;
    };
    if constexpr (Shape::marches) {
        const auto first_key = [&](int p) { return a.first + block.first + p * Shape::passing; };
        const auto place = [&](int p) -> Stage& { return stages[(p + marching_places) % marching_places]; };
        unsigned visible = 0;  // of one key, until it can be written
        int position = 0;
        march(
            ::min(tiles, (a.queries - block.first + Shape::own - 1) / Shape::own), load_queries,
            [&](int p) {
                Stage& stage = place(p);
                const int at = first_key(p);
                Tile::template load_whole<Shape::threads, Shape::passing>(stage.first, k, at, a.keys, a.dim_head);
                Tile::template load_whole<Shape::threads, Shape::passing>(stage.second, v, at, a.keys, a.dim_head);
                if (thread < Shape::passing) visible = is_visible(at + thread, a.keys);
            },
            [&](int p) {
                if (thread < Shape::passing) place(p).visible.set(thread, visible != 0);
            },
            [&](int t) { position = begin(t); },
            [&](int t, bool rest) {
                const MarchingWindow window(t, rest, first_key(t - 1), position, a.reach, a.keys);
                see(window.groups_of(stages), window, window.first, a.mask != nullptr || window.is_incomplete(a.keys));
            },
            end);
    } else {
        const Sight sight(a.first + block.first, Shape::own, a.reach, a.keys);
        const auto is_incomplete = [&](int i) {
            return a.mask != nullptr || sight.begin + (i + 1) * Shape::passing > sight.end;
        };
        const auto load = [&](int i) {
            Stage& stage = stages[i % Shape::stages];
            const int at = sight.begin + i * Shape::passing;
            const int rows = ::min(Shape::passing, (sight.end - at + 15) / 16 * 16);
            Tile::template load<Shape::threads>(stage.first, k, at, rows, sight.end, a.dim_head, a.vectors);
            Tile::template load<Shape::threads>(stage.second, v, at, rows, sight.end, a.dim_head, a.vectors);
            if (is_incomplete(i))
                for (int row = thread; row < (rows + 31) / 32 * 32; row += Shape::threads)
                    stage.visible.set(row, is_visible(at + row, sight.end) != 0);
            if (a.value_scale != nullptr)
                for (int row = thread; row < rows; row += Shape::threads)
                    stage.of_row[0][row] = at + row < sight.end ? a.value_scale[block.of_keys(a) + at + row] : Sum(0);
            end_copy_group();
        };
        load_queries(0);
        load(0);
        wait_for_copies<0>();
        __syncthreads();
        const int position = begin(0);
        pipeline<Shape::stages>((sight.end - sight.begin + Shape::passing - 1) / Shape::passing, load, [&](int i) {
            const Stage& stage = stages[i % Shape::stages];
            const int at = sight.begin + i * Shape::passing;
            see(
                [&](int group) {
                    return Group<Stage>{stage, 16 * group};
                },
                Groups(position, at, Shape::passing, sight.end, a.reach), at, is_incomplete(i));
        });
        end();
    }
}

/// Calls `run.template operator()<Arithmetic, width, passing>()` with how to multiply and how to pass: blocks march
/// along a window of short rows of 16 bits that their tiles cover, one of ±64 or less, and take a window of rows of
/// 256 bytes at once if tensor cores multiply.
template <bool window, typename T, typename Run>
void with_passing(const Cuda& policy, const Attention<T>& a, const Run& run) {
    with_arithmetic<T>(policy, [&]<typename Arithmetic>() {
        with_width(a.dim_head, [&]<int width>() {
            constexpr bool may_march = window && HalfPrecision<T> && width * sizeof(T) <= 128;
            constexpr bool at_once = window && Arithmetic::has_tensor_cores && width * sizeof(T) == 256;
            if constexpr (may_march) {
                if (a.reach <= marching_rows && a.vectors && a.value_scale == nullptr)
                    return run.template operator()<Arithmetic, width, Passing::marching>();
            }
            run.template operator()<Arithmetic, width, at_once ? Passing::at_once : Passing::in_turn>();
        });
    });
}

/// How many tiles of `tile_rows` of the `rows` rows of each head a block has: one, or so many to march over that the
/// blocks just fill the GPU.
template <typename Shape, typename T>
int tiles_of_block(const Cuda& policy, const Attention<T>& a, Index rows, Index tile_rows) {
    if (!Shape::marches) return 1;
    int multiprocessors = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, policy.device()),
          "cudaDeviceGetAttribute");
    constexpr Index most = 32;
    const Index blocks = Index{multiprocessors} * Shape::blocks_per_multiprocessor;
    const Index tiles = divide_up(rows, tile_rows) * a.heads() * a.batch;
    return static_cast<int>(std::clamp(divide_up(tiles, blocks), Index{1}, most));
}

}  // namespace colt5::cuda
