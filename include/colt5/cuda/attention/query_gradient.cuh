// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include <colt5/cuda/attention/gradients.cuh>

namespace colt5::cuda {

/// Half a row in a lane's registers. Lanes 2r and 2r + 1 share row r of 16: they have its 16-byte pieces alternately.
template <typename T, int width>
struct HalfRow {
    static constexpr int lanes = 16 / sizeof(T), pieces = width / lanes / 2 > 0 ? width / lanes / 2 : 1;
    Pack<T, lanes> vectors[pieces];

    __device__ static int row() { return lane_id() / 2; }
    /// `data` points to the row's first entry. If the row is not real, it is zeros.
    __device__ void load(const T* data, bool real, int dim_head) {
#pragma unroll
        for (int i = 0; i < pieces; ++i) {
            const int column = (2 * i + lane_id() % 2) * lanes;
            vectors[i] = real && column < dim_head ? load_pack<lanes>(data + column) : Pack<T, lanes>{};
        }
    }
    /// The inner product of this row and another, this one as products have it; both lanes get it.
    template <typename Arithmetic>
    __device__ typename Arithmetic::Sum dot(const HalfRow& other) const {
        using Sum = typename Arithmetic::Sum;
        Sum sum = 0;
#pragma unroll
        for (int i = 0; i < pieces; ++i)
#pragma unroll
            for (int e = 0; e < lanes; ++e)
                sum += Arithmetic::operand(vectors[i].values[e]) * static_cast<Sum>(other.vectors[i].values[e]);
        return sum + __shfl_xor_sync(0xffffffffu, sum, 1);
    }
};

/// The same inner product for rows whose length or address is no multiple of 16 bytes.
template <typename Arithmetic, typename T>
__device__ typename Arithmetic::Sum dot_of_lanes(const T* x, const T* y, bool real, int dim_head) {
    using Sum = typename Arithmetic::Sum;
    Sum sum = 0;
    if (real)
        for (int c = lane_id() % 2; c < dim_head; c += 2) sum += Arithmetic::operand(x[c]) * static_cast<Sum>(y[c]);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 1);
}

/// Assigns d_q and QueryNumbers. A block owns `tiles` tiles of queries, more than one only with Staging::sliding.
template <typename Shape, typename Bias>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks_per_multiprocessor)
    attention_query_gradient(const Attention<typename Shape::T> a, const Bias bias,
                             const AttentionGradients<typename Shape::T> d,
                             const QueryNumbers<typename Shape::Sum> numbers, int tiles) {
    using T = typename Shape::T;
    using Sum = typename Shape::Sum;
    using Arithmetic = typename Shape::Arithmetic;
    using Tile = typename Shape::Tile;
    using Stage = typename Shape::Stage;
    using Half = HalfRow<T, Shape::width>;
    static_assert(sizeof(typename Shape::Shared) <= shared_bytes);
    constexpr int width = Shape::width;
    constexpr bool has_bias = !std::is_same_v<Bias, NoBias>;
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);

    const int own_row = 16 * warp_id();
    const AttentionBlock<T> block(a, Shape::tile_rows * tiles);
    if (block.is_beyond(a)) return;
    const Rows<const T> q_rows = block.rows(a, a.q);
    const Rows<const T> out_rows = block.rows(a, a.out.with(d.out)), d_out_rows = block.rows(a, a.out.with(d.d_out));
    const HeadBias<T, Bias> head_bias(a, block, bias);
    const Index of_queries = block.of_queries(a);
    const Sum to_log2 = a.scale * static_cast<Sum>(log2_e);
    const bool vectors = Shape::slides || a.vectors, has_value_scale = !Shape::slides && a.value_scale != nullptr;
    const Reach reach = Reach::of_query(a);
    // Otherwise every query attends to at least two keys.
    const bool may_have_one_key =
        a.mask != nullptr || (a.keys == 1 && !a.sees_zeros) || a.ahead == 0 || HeadBias<T, Bias>::hides;
    const auto* const mask = reinterpret_cast<const std::uint8_t*>(block.mask(a));
    // What the next tile needs in registers, not in shared memory.
    Half next_out;
    // Whether the key that the lane looks at is visible: without a window key number lane_id(), with one the key at the
    // position of query lane_id() % 16 of the warp. See begin.
    unsigned next_visible = 1;
    Sum next_log_sum_exp[2];
    const auto load_queries = [&](int tile) {
        const int from = block.first + tile * Shape::tile_rows, first = from + own_row;
        load_tile_rows<Shape>(shared.first[tile % Shape::tile_buffers], q_rows, from, a.queries, a);
        load_tile_rows<Shape>(shared.second[tile % Shape::tile_buffers], d_out_rows, from, a.queries, a);
        const int key = a.reach == Attention<T>::everything ? lane_id() : a.first + first + lane_id() % 16;
        if (may_have_one_key) {
            next_visible = key < a.keys;
            if (mask != nullptr && key < a.keys)
                next_visible = mask[key];  // not compared yet, which would wait for the load
        }
        if (vectors) next_out.load(out_rows[first + Half::row()], first + Half::row() < a.queries, a.dim_head);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = first + accumulator_row() + 8 * half;
            next_log_sum_exp[half] =
                query < a.queries ? d.log_sum_exp[of_queries + query] : -std::numeric_limits<Sum>::infinity();
        }
    };

    // State of the warp's 16 queries of the current tile.
    int first = 0, position = 0;
    T* own = nullptr;
    Left<Arithmetic, width, Shape::left_is_resident> q, d_out;
    Sum shift[2], out_dot[2], sum[width / 8][4];
    Sum d_s_sum[2];    // with a bias
    bool few = false;  // some query may have a single key: then keys are counted and the last dp is stored
    int key_count[2];
    Sum d_p_of_last_key[2];
    const auto begin = [&](int tile) {
        first = block.first + tile * Shape::tile_rows + own_row;
        position = a.first + first;
        own = shared.first[tile % Shape::tile_buffers] + own_row * Tile::stride;
        T* const own_d_out = shared.second[tile % Shape::tile_buffers] + own_row * Tile::stride;
        const int query = first + Half::row();
        Sum dot;
        if (vectors) {
            Half half;
            half.load(own_d_out + Half::row() * Tile::stride, true, a.dim_head);
            dot = half.template dot<Arithmetic>(next_out);
        } else {
            dot = dot_of_lanes<Arithmetic>(d_out_rows[query], out_rows[query], query < a.queries, a.dim_head);
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
        if (may_have_one_key) {
            // Without a window, two visible keys among the first 32 rule it out. With a window, it is ruled out if the
            // keys at the positions of all 16 queries are visible; but not in causal attention for the first of the 16,
            // whose other key is before them.
            unsigned visible = __ballot_sync(0xffffffffu, next_visible != 0);
            if constexpr (HeadBias<T, Bias>::hides) {
                const int query = first + lane_id() % 16, seen = head_bias.keys_seen(query, a.keys);
                const int least = __reduce_min_sync(0xffffffffu, query < a.queries ? seen : a.keys);
                if (least < warp_size) visible &= (1u << least) - 1;
            }
            few = a.reach == Attention<T>::everything
                      ? __popc(visible) < 2
                      : visible != 0xffffffffu || (a.ahead == 0 && (position == 0 || a.mask != nullptr));
            key_count[0] = key_count[1] = 0;
            d_p_of_last_key[0] = d_p_of_last_key[1] = 0;
        }
        d_s_sum[0] = d_s_sum[1] = 0;
        q = decltype(q)(own);
        d_out = decltype(d_out)(own_d_out);
#pragma unroll
        for (int j = 0; j < width / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[j][e] = 0;
        return position;
    };
    const auto process = [&](const auto& at, const Groups& range, int first_key, bool incomplete) {
        const auto process_groups = [&](auto count, int group) {
            constexpr int groups = decltype(count)::value;
            Sum p[groups][2][4], d_p[groups][2][4];
            multiply_groups<Tile>(p, d_p, q, d_out, at, group);
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                const int columns = first_key + 16 * (group + c);
                head_bias.add_to_queries(p[c], first, columns);
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
                        if (reach.excludes(columns + column - position - row) || (visible >> column & 1) == 0 ||
                            head_bias.is_hidden(first + row, columns + column))
                            return;
                        ++key_count[e / 2];
                        d_p_of_last_key[e / 2] = d_p[c][j][e];
                    });
                for_each_entry([&](int j, int e, int, int) {
                    const Sum weight = fast_exp2(p[c][j][e] * to_log2 - shift[e / 2]);
                    d_p[c][j][e] = weight * (d_p[c][j][e] - out_dot[e / 2]);
                });
                // Hidden keys contribute nothing, even if their values are not finite.
                const GroupMask<RowsAre::queries, HeadBias<T, Bias>> mask{reach, head_bias, first, position, columns};
                const auto hide = [&](int j, int e) { d_p[c][j][e] = 0; };
                mask.hide_by_position(hide);
                mask.hide_masked(visible, hide);
                if constexpr (has_bias) for_each_entry([&](int j, int e, int, int) { d_s_sum[e / 2] += d_p[c][j][e]; });
            }
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                const auto [stage, row] = at(group + c);
                Arithmetic::template multiply<width>(sum, d_p[c], stage.first + row * Tile::stride);
            }
        };
        for_each_step<Shape::groups_at_once>(range, process_groups);
    };
    const auto end = [&] {
        Sum factor[2] = {a.scale, a.scale};
        if (has_bias && !a.sees_zeros) {  // else Σ ds has a part of the keys of 0, too
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int query = first + accumulator_row() + 8 * half;
                const Sum rest = row_reduce(d_s_sum[half], Plus());
                if (lane_id() % 4 == 0 && query < a.queries) numbers.dot[of_queries + query] = out_dot[half] + rest;
            }
        }
        if (few)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int query = first + accumulator_row() + 8 * half;
                const Sum d_p = row_reduce(d_p_of_last_key[half], Plus());
                const bool has_one_key = row_reduce(key_count[half], Plus()) == 1;
                if (has_one_key) factor[half] = 0;
                if (has_one_key && lane_id() % 4 == 0 && query < a.queries) numbers.dot[of_queries + query] = d_p;
            }
        Tile::store(own, sum, factor[0], factor[1], block.rows(a, d.d_q), first, a.queries, a.dim_head, vectors);
        unsigned recompute = rows_with_nan(sum);
        if (recompute == 0) return;
        __syncwarp();
        for (; recompute != 0; recompute &= recompute - 1) {
            const int row = __ffs(static_cast<int>(recompute)) - 1;
            const Sum of_row = __shfl_sync(0xffffffffu, row < 8 ? shift[0] : shift[1], row % 8 * 4);
            const Sum dot = __shfl_sync(0xffffffffu, row < 8 ? out_dot[0] : out_dot[1], row % 8 * 4);
            if (first + row < a.queries)
                query_gradient_row(
                    block.rows(a, d.d_q)[first + row], q_rows[first + row], d_out_rows[first + row],
                    block.template key_rows<Shape::picked>(a, a.k), block.template key_rows<Shape::picked>(a, a.v),
                    MaskedKeyRange(position + row, reach, head_bias.keys_seen(first + row, a.keys), block.mask(a)),
                    block.value_scale(a), of_row, dot, a.sees_zeros, a.scale, a.dim_head,
                    head_bias.of_query(first + row));
        }
    };

    const int keys = head_bias.most_keys_seen(block.first, Shape::tile_rows, a.keys, Shape::stage_rows);
    stream_keys<Shape>(a, block, shared.stage, tiles, keys, load_queries, begin, process, end);
}

}  // namespace colt5::cuda
