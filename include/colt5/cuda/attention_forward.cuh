// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention_passing.cuh>

namespace colt5::cuda {

/// The sizes of the forward kernel: each warp has 16 queries at a time, and keys pass through shared memory.
template <typename Arithmetic_, int width_, Passing passing>
struct ForwardShape {
    using Arithmetic = Arithmetic_;
    using T = typename Arithmetic::Scalar;
    using Sum = typename Arithmetic::Sum;
    using Tile = cuda::Tile<Arithmetic, width_>;
    static constexpr bool marches = passing == Passing::marching, at_once = passing == Passing::at_once;
    static constexpr int width = width_, row_bytes = width * sizeof(T);
    static constexpr int warps = row_bytes > 512 ? 2 : row_bytes <= 128 && at_once ? 8 : 4;
    static constexpr int queries = 16 * warps, threads = warp_size * warps, own_tiles = marches ? 2 : 1;
    static constexpr int in_turn = row_bytes <= 256 ? 64 : row_bytes <= 512 ? 32 : 16;
    static constexpr int keys = marches ? queries : at_once ? window_rows<T>(queries, queries, Tile::stride) : in_turn;
    static constexpr int stages = marches ? marching_places : at_once || row_bytes > 256 ? 1 : 2;
    /// Groups of 16 keys per step of the softmax.
    static constexpr int chunk = marches ? 2 : at_once ? 3 : keys / 16;
    static constexpr int blocks_per_multiprocessor = marches                      ? 3
                                                     : row_bytes > 256            ? 1
                                                     : row_bytes > 128 || at_once ? 2
                                                                                  : 4;

    struct alignas(16) Stage {  // its rows are copied in 16 bytes
        T k[keys * Tile::stride], v[keys * Tile::stride];
        Sum value_scale[keys];
        Visibility<keys> visible;  // filled if there is a mask, or if keys begin or end in this block
    };
    struct Shared {
        T q[own_tiles][queries * Tile::stride];
        Stage stage[stages];
    };
};

/// Online softmax over the blocks of keys that a tile of queries sees; see Attention. A block of the kernel has `tiles`
/// tiles of queries, more than one if it marches.
template <typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks_per_multiprocessor)
    attention_forward(const Attention<typename Shape::T> a, typename Shape::T* out, typename Shape::Sum* log_sum_exp,
                      int tiles) {
    using T = typename Shape::T;
    using Sum = typename Shape::Sum;
    using Arithmetic = typename Shape::Arithmetic;
    using Tile = typename Shape::Tile;
    using Stage = typename Shape::Stage;
    static_assert(sizeof(typename Shape::Shared) <= shared_bytes);
    constexpr int width = Shape::width;
    constexpr Sum infinity = std::numeric_limits<Sum>::infinity();
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);

    const int thread = static_cast<int>(threadIdx.x), warp = warp_id();
    const AttentionBlock<T> block(a, Shape::queries * tiles);
    const Rows<const T> q_rows = block.rows(a, a.q), k_rows = block.rows(a, a.k), v_rows = block.rows(a, a.v);
    const Sum to_log2 = a.scale * static_cast<Sum>(log2_e);
    const bool vectors = Shape::marches || a.vectors, has_value_scale = !Shape::marches && a.value_scale != nullptr;
    // As it is in memory: a comparison would wait for it.
    const std::uint8_t* const mask = reinterpret_cast<const std::uint8_t*>(a.mask) + block.of_keys(a);
    const auto is_visible = [&](int key, int limit) {
        unsigned visible = key >= 0 && key < limit;
        if (a.mask != nullptr && visible != 0) visible = mask[key];
        return visible;
    };
    const auto load_queries = [&](int tile) {
        T* const to = shared.q[tile % Shape::own_tiles];
        const int from = block.first + tile * Shape::queries;
        if constexpr (Shape::marches)
            Tile::template load_whole<Shape::threads, Shape::queries>(to, q_rows, from, a.queries, a.dim_head);
        else
            Tile::template load<Shape::threads>(to, q_rows, from, Shape::queries, a.queries, a.dim_head, vectors);
    };

    // Of the warp's 16 queries in the current tile.
    int first = 0, position = 0;
    T* own = nullptr;
    Left<Arithmetic, width, true> q;
    Sum largest[2], total[2], sum[width / 8][4];
    const auto begin = [&](int tile) {
        first = block.first + tile * Shape::queries + 16 * warp;
        position = a.first + first;
        own = shared.q[tile % Shape::own_tiles] + 16 * warp * Tile::stride;
        q = Left<Arithmetic, width, true>(own);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            largest[half] = -infinity;
            total[half] = 0;
        }
#pragma unroll
        for (int j = 0; j < width / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[j][e] = 0;
    };
    // Groups of keys, of which at(i) is the i-th from the key at block_first on.
    const auto see = [&](const auto& at, const Groups& which, int block_first, bool incomplete) {
        const auto attend = [&](auto count, int group) {
            constexpr int groups = decltype(count)::value;
            Sum score[groups][2][4];
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                const auto [stage, row] = at(group + c);
                multiply_transposed(score[c], q, stage.k + row * Tile::stride);
            }
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                const int columns = block_first + 16 * (group + c);
                if (!sees_all(position, columns, a.reach))
                    for_each_entry([&](int j, int e, int row, int column) {
                        if (is_far(columns + column - position - row, a.reach)) score[c][j][e] = -infinity;
                    });
                if (!incomplete) continue;
                const std::uint32_t visible = at(group + c).stage.visible.of_group(at(group + c).row);
                if (visible != whole_group)
                    for_each_entry([&](int j, int e, int, int column) {
                        if ((visible >> column & 1) == 0) score[c][j][e] = -infinity;
                    });
            }
            Sum top[2] = {largest[0], largest[1]}, shift[2];
#pragma unroll
            for (int c = 0; c < groups; ++c)
                for_each_entry([&](int j, int e, int, int) { top[e / 2] = ::max(top[e / 2], score[c][j][e]); });
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                top[half] = row_reduce(top[half], Greater());
                shift[half] = top[half] == -infinity ? Sum(0) : top[half] * to_log2;
                const Sum shrink = power_of_two(largest[half] * to_log2 - shift[half]);
                largest[half] = top[half];
                total[half] *= shrink;
#pragma unroll
                for (int j = 0; j < width / 8; ++j) {
                    sum[j][2 * half] *= shrink;
                    sum[j][2 * half + 1] *= shrink;
                }
            }
#pragma unroll
            for (int c = 0; c < groups; ++c)
                for_each_entry([&](int j, int e, int, int) {
                    score[c][j][e] = power_of_two(score[c][j][e] * to_log2 - shift[e / 2]);
                    total[e / 2] += score[c][j][e];
                });
            if (has_value_scale)
#pragma unroll
                for (int c = 0; c < groups; ++c) {
                    const auto& [stage, first_row] = at(group + c);
                    const Sum* const scales = stage.value_scale + first_row;
                    for_each_entry([&](int j, int e, int, int column) { score[c][j][e] *= scales[column]; });
                }
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                const auto [stage, row] = at(group + c);
                Arithmetic::template multiply<width>(sum, score[c], stage.v + row * Tile::stride);
            }
        };
        for_each_chunk<Shape::chunk>(which, attend);
    };
    const auto end = [&](int) {
        Sum factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Sum all = row_reduce(total[half], Plus());
            factor[half] = all > Sum(0) ? reciprocal(all) : Sum(0);
            const int query = first + accumulator_row() + 8 * half;
            if (log_sum_exp != nullptr && lane_id() % 4 == 0 && query < a.queries)
                log_sum_exp[block.of_queries(a) + query] = largest[half] * a.scale + ::log(all);
        }
        Tile::store(own, sum, factor[0], factor[1], block.rows(a, a.out.with(out)), first, a.queries, a.dim_head,
                    vectors);
    };

    if constexpr (Shape::marches) {
        const auto first_key = [&](int p) { return a.first + block.first + p * Shape::keys; };
        const auto place = [&](int p) -> Stage& { return shared.stage[(p + Shape::stages) % Shape::stages]; };
        unsigned visible = 0;  // of one key, until it can be written
        march(
            ::min(tiles, (a.queries - block.first + Shape::queries - 1) / Shape::queries), load_queries,
            [&](int p) {
                Stage& stage = place(p);
                const int at = first_key(p);
                Tile::template load_whole<Shape::threads, Shape::keys>(stage.k, k_rows, at, a.keys, a.dim_head);
                Tile::template load_whole<Shape::threads, Shape::keys>(stage.v, v_rows, at, a.keys, a.dim_head);
                if (thread < Shape::keys) visible = is_visible(at + thread, a.keys);
            },
            [&](int p) {
                if (thread < Shape::keys) place(p).visible.set(thread, visible != 0);
            },
            begin,
            [&](int t, bool rest) {
                const MarchingWindow window(t, rest, first_key(t - 1), position, a.reach, a.keys);
                see(window.groups_of(shared.stage), window, window.first,
                    a.mask != nullptr || window.is_incomplete(a.keys));
            },
            end);
    } else {
        const Sight sight(a.first + block.first, Shape::queries, a.reach, a.keys);
        const auto is_incomplete = [&](int i) {
            return a.mask != nullptr || sight.begin + (i + 1) * Shape::keys > sight.end;
        };
        const auto load = [&](int i) {
            Stage& stage = shared.stage[i % Shape::stages];
            const int at = sight.begin + i * Shape::keys, rows = ::min(Shape::keys, (sight.end - at + 15) / 16 * 16);
            Tile::template load<Shape::threads>(stage.k, k_rows, at, rows, sight.end, a.dim_head, vectors);
            Tile::template load<Shape::threads>(stage.v, v_rows, at, rows, sight.end, a.dim_head, vectors);
            if (is_incomplete(i))
                for (int row = thread; row < (rows + 31) / 32 * 32; row += Shape::threads)
                    stage.visible.set(row, is_visible(at + row, sight.end) != 0);
            if (has_value_scale)
                for (int row = thread; row < rows; row += Shape::threads)
                    stage.value_scale[row] = at + row < sight.end ? a.value_scale[block.of_keys(a) + at + row] : Sum(0);
            end_copy_group();
        };
        load_queries(0);
        load(0);
        wait_for_copies<0>();
        __syncthreads();
        begin(0);
        pipeline<Shape::stages>((sight.end - sight.begin + Shape::keys - 1) / Shape::keys, load, [&](int i) {
            const Stage& stage = shared.stage[i % Shape::stages];
            const int at = sight.begin + i * Shape::keys;
            see(
                [&](int group) {
                    return Group<Stage>{stage, 16 * group};
                },
                Groups(position, at, Shape::keys, sight.end, a.reach), at, is_incomplete(i));
        });
        end(0);
    }
}

/// Assigns `out`, which has the layout of a.out, and log_sum_exp (batch, heads, queries) unless it is null.
template <bool window, typename T>
void run_attention_forward(const Cuda& policy, const Attention<T>& a, T* out, accumulate_t<T>* log_sum_exp) {
    with_passing<window, T>(policy, a, [&]<typename Arithmetic, int width, Passing passing>() {
        using Shape = ForwardShape<Arithmetic, width, passing>;
        const int tiles = tiles_of_block<Shape>(policy, a, a.queries, Shape::queries);
        launch(policy, "attention_forward", attention_forward<Shape>,
               attention_grid(a, a.queries, Shape::queries * tiles), Shape::threads, sizeof(typename Shape::Shared), a,
               out, log_sum_exp, tiles);
    });
}

}  // namespace colt5::cuda
