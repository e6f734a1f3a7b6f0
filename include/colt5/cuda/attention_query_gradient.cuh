// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention_gradients.cuh>

namespace colt5::cuda {

/// A lane's half of the row lane / 2 of a warp's 16 rows, in 16-byte pieces that the two lanes take in turn.
template <typename T, int width>
struct HalfRow {
    static constexpr int lanes = 16 / sizeof(T), pieces = width / lanes / 2 > 0 ? width / lanes / 2 : 1;
    struct alignas(16) Vector {
        T values[lanes];
    };
    Vector vectors[pieces];

    __device__ static int row() { return lane_id() / 2; }
    /// Zeros unless the row is real; `data` is its first entry.
    __device__ void load(const T* data, bool real, int dim_head) {
#pragma unroll
        for (int i = 0; i < pieces; ++i) {
            const int column = (2 * i + lane_id() % 2) * lanes;
            vectors[i] = real && column < dim_head ? *reinterpret_cast<const Vector*>(data + column) : Vector{};
        }
    }
    /// The rows' inner product, for both lanes.
    template <typename Sum>
    __device__ Sum dot(const HalfRow& other) const {
        Sum sum = 0;
#pragma unroll
        for (int i = 0; i < pieces; ++i)
#pragma unroll
            for (int e = 0; e < lanes; ++e)
                sum += static_cast<Sum>(vectors[i].values[e]) * static_cast<Sum>(other.vectors[i].values[e]);
        return sum + __shfl_xor_sync(0xffffffffu, sum, 1);
    }
};

/// The same product where rows are not made of whole vectors.
template <typename Sum, typename T>
__device__ Sum dot_of_lanes(const T* x, const T* y, bool real, int dim_head) {
    Sum sum = 0;
    if (real)
        for (int c = lane_id() % 2; c < dim_head; c += 2) sum += static_cast<Sum>(x[c]) * static_cast<Sum>(y[c]);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 1);
}

/// d_q and QueryNumbers, by tiles of queries: a block of the kernel has `tiles` of them, more than one if it marches.
template <typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks_per_multiprocessor)
    attention_query_gradient(const Attention<typename Shape::T> a, const AttentionGradients<typename Shape::T> d,
                             const QueryNumbers<typename Shape::Sum> numbers, int tiles) {
    using T = typename Shape::T;
    using Sum = typename Shape::Sum;
    using Arithmetic = typename Shape::Arithmetic;
    using Tile = typename Shape::Tile;
    using Stage = typename Shape::Stage;
    using Half = HalfRow<T, Shape::width>;
    static_assert(sizeof(typename Shape::Shared) <= shared_bytes);
    constexpr int width = Shape::width;
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);

    const int own_row = 16 * warp_id();
    const AttentionBlock<T> block(a, Shape::own * tiles);
    if (block.is_beyond(a)) return;
    const Rows<const T> q_rows = block.rows(a, a.q);
    const Rows<const T> out_rows = block.rows(a, a.out.with(d.out)), d_out_rows = block.rows(a, a.out.with(d.d_out));
    const Index of_queries = block.of_queries(a);
    const Sum to_log2 = a.scale * static_cast<Sum>(log2_e);
    const bool vectors = Shape::marches || a.vectors, has_value_scale = !Shape::marches && a.value_scale != nullptr;
    // Of the next tile's queries, what is not copied into shared memory.
    Half next_out;
    Sum next_log_sum_exp[2];
    const auto load_queries = [&](int tile) {
        const int from = block.first + tile * Shape::own, first = from + own_row;
        load_own_rows<Shape>(shared.first[tile % Shape::own_tiles], q_rows, from, a.queries, a);
        load_own_rows<Shape>(shared.second[tile % Shape::own_tiles], d_out_rows, from, a.queries, a);
        if (vectors) next_out.load(out_rows[first + Half::row()], first + Half::row() < a.queries, a.dim_head);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = first + accumulator_row() + 8 * half;
            next_log_sum_exp[half] =
                query < a.queries ? d.log_sum_exp[of_queries + query] : -std::numeric_limits<Sum>::infinity();
        }
    };

    // Of the warp's 16 queries in the current tile.
    int first = 0, position = 0;
    T* own = nullptr;
    Left<Arithmetic, width, Shape::left_is_resident> q, d_out;
    Sum shift[2], out_dot[2], sum[width / 8][4];
    const auto begin = [&](int tile) {
        first = block.first + tile * Shape::own + own_row;
        position = a.first + first;
        own = shared.first[tile % Shape::own_tiles] + own_row * Tile::stride;
        T* const own_d_out = shared.second[tile % Shape::own_tiles] + own_row * Tile::stride;
        const int query = first + Half::row();
        Sum dot;
        if (vectors) {
            Half half;
            half.load(own_d_out + Half::row() * Tile::stride, true, a.dim_head);
            dot = half.template dot<Sum>(next_out);
        } else {
            dot = dot_of_lanes<Sum>(out_rows[query], d_out_rows[query], query < a.queries, a.dim_head);
        }
        __syncwarp();
        if (lane_id() % 2 == 0) {
            shared.of_row[own_row + Half::row()] = dot;
            if (query < a.queries) numbers.dot[of_queries + query] = dot;
        }
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = accumulator_row() + 8 * half;
            shift[half] = shift_of(next_log_sum_exp[half]);
            out_dot[half] = shared.of_row[own_row + row];
            if (lane_id() % 4 == 0 && first + row < a.queries) numbers.shift[of_queries + first + row] = shift[half];
        }
        q = decltype(q)(own);
        d_out = decltype(d_out)(own_d_out);
#pragma unroll
        for (int j = 0; j < width / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[j][e] = 0;
        return position;
    };
    const auto see = [&](const auto& at, const Groups& which, int block_first, bool incomplete) {
        const auto add = [&](auto count, int group) {
            constexpr int groups = decltype(count)::value;
            Sum p[groups][2][4], d_p[groups][2][4];
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                const auto [stage, row] = at(group + c);
                multiply_transposed(p[c], q, stage.first + row * Tile::stride);
                multiply_transposed(d_p[c], d_out, stage.second + row * Tile::stride);
            }
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                const int columns = block_first + 16 * (group + c);
                for_each_entry(
                    [&](int j, int e, int, int) { p[c][j][e] = power_of_two(p[c][j][e] * to_log2 - shift[e / 2]); });
                if (!sees_all(position, columns, a.reach))
                    for_each_entry([&](int j, int e, int row, int column) {
                        if (is_far(columns + column - position - row, a.reach)) p[c][j][e] = 0;
                    });
                if (incomplete) {
                    const std::uint32_t visible = at(group + c).stage.visible.of_group(at(group + c).row);
                    if (visible != whole_group)
                        for_each_entry([&](int j, int e, int, int column) {
                            if ((visible >> column & 1) == 0) p[c][j][e] = 0;
                        });
                }
                if (has_value_scale) {
                    const Sum* const scales = at(group + c).stage.of_row[0] + at(group + c).row;
                    for_each_entry([&](int j, int e, int, int column) { d_p[c][j][e] *= scales[column]; });
                }
                for_each_entry(
                    [&](int j, int e, int, int) { d_p[c][j][e] = p[c][j][e] * (d_p[c][j][e] - out_dot[e / 2]); });
            }
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                const auto [stage, row] = at(group + c);
                Arithmetic::template multiply<width>(sum, d_p[c], stage.first + row * Tile::stride);
            }
        };
        for_each_chunk<Shape::chunk>(which, add);
    };
    const auto end = [&] {
        Tile::store(own, sum, a.scale, a.scale, block.rows(a, d.d_q), first, a.queries, a.dim_head, vectors);
    };

    pass_keys<Shape>(a, block, shared.stage, tiles, load_queries, begin, see, end);
}

}  // namespace colt5::cuda
