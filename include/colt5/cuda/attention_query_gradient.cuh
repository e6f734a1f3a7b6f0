// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

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
    // Only then can a query see a single key.
    const bool may_see_one_key = a.mask != nullptr || a.keys == 1;
    const auto* const mask = reinterpret_cast<const std::uint8_t*>(block.mask(a));
    // Of the next tile's queries, what is not copied into shared memory.
    Half next_out;
    unsigned next_visible = 1;  // of one key: see begin
    Sum next_log_sum_exp[2];
    const auto load_queries = [&](int tile) {
        const int from = block.first + tile * Shape::own, first = from + own_row;
        load_own_rows<Shape>(shared.first[tile % Shape::own_tiles], q_rows, from, a.queries, a);
        load_own_rows<Shape>(shared.second[tile % Shape::own_tiles], d_out_rows, from, a.queries, a);
        const int key = a.reach == Attention<T>::everything ? lane_id() : a.first + first + lane_id() % 16;
        if (may_see_one_key) {
            next_visible = key < a.keys;
            if (mask != nullptr && key < a.keys) next_visible = mask[key];  // as it is: a comparison would wait for it
        }
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
    bool few = false;  // some of them may see one key alone: count, and note its d_p
    int seen[2];
    Sum d_p_of_seen[2];
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
        if (may_see_one_key) {
            // Two of the first keys are enough, or the queries' own and their neighbours.
            const unsigned visible = __ballot_sync(0xffffffffu, next_visible != 0);
            few = a.reach == Attention<T>::everything ? __popc(visible) < 2 : visible != 0xffffffffu;
            seen[0] = seen[1] = 0;
            d_p_of_seen[0] = d_p_of_seen[1] = 0;
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
                if (has_value_scale) {
                    const Sum* const scales = at(group + c).stage.of_row[0] + at(group + c).row;
                    for_each_entry([&](int j, int e, int, int column) {
                        d_p[c][j][e] = rounded_product(d_p[c][j][e], scales[column]);
                    });
                }
                const std::uint32_t visible =
                    incomplete ? at(group + c).stage.visible.of_group(at(group + c).row) : whole_group;
                if (few)
                    for_each_entry([&](int j, int e, int row, int column) {
                        if (is_far(columns + column - position - row, a.reach) || (visible >> column & 1) == 0) return;
                        ++seen[e / 2];
                        d_p_of_seen[e / 2] = d_p[c][j][e];
                    });
                for_each_entry([&](int j, int e, int, int) {
                    const Sum weight = power_of_two(p[c][j][e] * to_log2 - shift[e / 2]);
                    d_p[c][j][e] = weight * (d_p[c][j][e] - out_dot[e / 2]);
                });
                // What is not seen counts for nothing even if it is not finite.
                if (!sees_all(position, columns, a.reach))
                    for_each_entry([&](int j, int e, int row, int column) {
                        if (is_far(columns + column - position - row, a.reach)) d_p[c][j][e] = 0;
                    });
                if (visible != whole_group)
                    for_each_entry([&](int j, int e, int, int column) {
                        if ((visible >> column & 1) == 0) d_p[c][j][e] = 0;
                    });
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
        Sum factor[2] = {a.scale, a.scale};
        if (few)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int query = first + accumulator_row() + 8 * half;
                const Sum d_p = row_reduce(d_p_of_seen[half], Plus());
                const bool sees_one = row_reduce(seen[half], Plus()) == 1;
                if (sees_one) factor[half] = 0;
                if (sees_one && lane_id() % 4 == 0 && query < a.queries) numbers.dot[of_queries + query] = d_p;
            }
        Tile::store(own, sum, factor[0], factor[1], block.rows(a, d.d_q), first, a.queries, a.dim_head, vectors);
        unsigned again = rows_with_nan(sum);
        if (again == 0) return;
        __syncwarp();
        for (; again != 0; again &= again - 1) {
            const int row = __ffs(static_cast<int>(again)) - 1;
            const Sum of_row = __shfl_sync(0xffffffffu, row < 8 ? shift[0] : shift[1], row % 8 * 4);
            const Sum dot = __shfl_sync(0xffffffffu, row < 8 ? out_dot[0] : out_dot[1], row % 8 * 4);
            if (first + row < a.queries)
                query_gradient_row(block.rows(a, d.d_q)[first + row], q_rows[first + row], d_out_rows[first + row],
                                   block.rows(a, a.k), block.rows(a, a.v),
                                   RowsSeen(position + row, a.reach, a.keys, block.mask(a)), block.value_scale(a),
                                   of_row, dot, a.scale, a.dim_head);
        }
    };

    pass_keys<Shape>(a, block, shared.stage, tiles, load_queries, begin, see, end);
}

}  // namespace colt5::cuda
