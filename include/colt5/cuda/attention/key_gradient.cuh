// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <colt5/cuda/attention/bias_gradient.cuh>
#include <colt5/cuda/attention/gradients.cuh>

namespace colt5::cuda {

/// Assigns d_k, d_v, each head's part of d_value_scale and each warp's part of the gradient of the bias. A block owns
/// `tiles` tiles of keys, more than one only with Staging::sliding.
template <typename Shape, typename Bias>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks_per_multiprocessor)
    attention_key_gradient(const Attention<typename Shape::T> a, const Bias bias,
                           const AttentionGradients<typename Shape::T> d,
                           const QueryNumbers<typename Shape::Sum> numbers, int tiles) {
    using T = typename Shape::T;
    using Sum = typename Shape::Sum;
    using Arithmetic = typename Shape::Arithmetic;
    using Tile = typename Shape::Tile;
    using Stage = typename Shape::Stage;
    static_assert(sizeof(typename Shape::Shared) <= shared_bytes);
    constexpr int width = Shape::width;
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);

    const int thread = static_cast<int>(threadIdx.x), own_row = 16 * warp_id();
    const AttentionBlock<T> block(a, Shape::tile_rows * tiles);
    if (block.is_beyond(a)) return;
    const HeadBias<T, Bias> head_bias(a, block, bias);
    BiasGradient<Shape, Bias> bias_gradient(a, block, bias, memory + sizeof(typename Shape::Shared));
    const auto k_rows = block.template key_rows<Shape::picked>(a, a.k);
    const auto v_rows = block.template key_rows<Shape::picked>(a, a.v);
    const Rows<const T> q_rows = block.rows(a, a.q), d_out_rows = block.rows(a, a.out.with(d.d_out));
    const Sum to_log2 = a.scale * static_cast<Sum>(log2_e);
    const Reach reach = Reach::of_key(a);
    const bool vectors = Shape::slides || a.vectors, has_value_scale = !Shape::slides && a.value_scale != nullptr;
    // The mask of the next tile's keys, in registers: read as bytes and compared later, so as not to wait for the load.
    unsigned next_visible[2] = {1, 1};
    const std::uint8_t* const mask = reinterpret_cast<const std::uint8_t*>(a.mask) + block.of_keys(a);
    const auto load_keys = [&](int tile) {
        const int from = block.first + tile * Shape::tile_rows;
        if (a.mask != nullptr)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int key = from + own_row + accumulator_row() + 8 * half;
                if (key < a.keys) next_visible[half] = mask[key];
            }
        load_tile_rows<Shape>(shared.first[tile % Shape::tile_buffers], k_rows, from, a.keys, a);
        load_tile_rows<Shape>(shared.second[tile % Shape::tile_buffers], v_rows, from, a.keys, a);
    };
    // Rows outside the sequence get shift = ∞, so that their p is 0.
    const auto load_numbers = [&](Stage& stage, int first, int rows, int limit) {
        const Index at = block.of_queries(a) + first;
        for (int row = thread; row < rows; row += Shape::threads) {
            const bool real = first + row >= 0 && first + row < limit;
            if constexpr (std::is_same_v<Sum, float>) {
                if (real) {
                    copy_float(&stage.of_row[0][row], numbers.shift + at + row, true);
                    copy_float(&stage.of_row[1][row], numbers.dot + at + row, true);
                    continue;
                }
            }
            stage.of_row[0][row] = real ? numbers.shift[at + row] : std::numeric_limits<Sum>::infinity();
            stage.of_row[1][row] = real ? numbers.dot[at + row] : Sum(0);
        }
    };

    // State of the warp's 16 keys of the current tile.
    int first = 0, position = 0;  // the warp's first key, and the query at the same token
    T *own_k = nullptr, *own_v = nullptr;
    Left<Arithmetic, width, Shape::left_is_resident> k, v;
    Sum value_scale[2], d_k[width / 8][4], d_v[width / 8][4];
    unsigned visible[2];
    const auto begin = [&](int tile) {
        first = block.first + tile * Shape::tile_rows + own_row;
        position = first - a.first;
        own_k = shared.first[tile % Shape::tile_buffers] + own_row * Tile::stride;
        own_v = shared.second[tile % Shape::tile_buffers] + own_row * Tile::stride;
        k = decltype(k)(own_k);
        v = decltype(v)(own_v);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int key = first + accumulator_row() + 8 * half;
            visible[half] = next_visible[half];
            // That of a masked key, whose gradients are 0, may be NaN.
            const bool is_scaled = has_value_scale && key < a.keys && visible[half] != 0;
            value_scale[half] = is_scaled ? a.value_scale[block.of_keys(a) + key] : Sum(1);
        }
#pragma unroll
        for (int j = 0; j < width / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) d_k[j][e] = d_v[j][e] = 0;
    };
    // Accumulates over groups of 16 queries of one stage: at(i) has the queries from first_query + 16 i on.
    const auto process = [&](const auto& at, const Groups& range, int first_query) {
        const auto process_groups = [&](auto count, int group) {
            constexpr int groups = decltype(count)::value;
            Sum p[groups][2][4], d_p[groups][2][4];
            multiply_groups<Tile>(p, d_p, k, v, at, group);
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                const int columns = first_query + 16 * (group + c);
                const Sum* const shifts = at(group + c).stage.of_row[0] + at(group + c).row;
                const Sum* const dots = at(group + c).stage.of_row[1] + at(group + c).row;
                head_bias.add_to_keys(p[c], first, columns);
                for_each_entry([&](int j, int e, int, int column) {
                    p[c][j][e] = fast_exp2(p[c][j][e] * to_log2 - shifts[column]);
                });
                for_each_entry([&](int j, int e, int, int column) {
                    const Sum scaled =
                        has_value_scale ? rounded_product(d_p[c][j][e], value_scale[e / 2]) : d_p[c][j][e];
                    d_p[c][j][e] = p[c][j][e] * (scaled - dots[column]);
                });
                // Hidden queries have weight 0. Rows that still become NaN, by 0 · NaN in the product, are
                // recomputed in `end`.
                const GroupMask<RowsAre::keys, HeadBias<T, Bias>> mask{reach, head_bias, first, position, columns};
                mask.hide_by_position([&](int j, int e) { p[c][j][e] = d_p[c][j][e] = 0; });
                if constexpr (BiasGradient<Shape, Bias>::is_present) {
                    Sum d_s[2][4];
                    for_each_entry([&](int j, int e, int row, int) {
                        d_s[j][e] = visible[e / 2] != 0 && first + row < a.keys ? d_p[c][j][e] : Sum(0);
                    });
                    bias_gradient.add(d_s, first, columns);
                }
            }
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                const auto [stage, row] = at(group + c);
                Arithmetic::template multiply<width>(d_v, p[c], stage.second + row * Tile::stride);
                Arithmetic::template multiply<width>(d_k, d_p[c], stage.first + row * Tile::stride);
            }
        };
        for_each_step<Shape::groups_at_once>(range, process_groups);
    };
    const auto end = [&] {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = accumulator_row() + 8 * half;
            // A row of the accumulators depends on its own key alone, so the gradients of masked keys become 0 here,
            // and the products need no mask.
            if (visible[half] == 0)
#pragma unroll
                for (int j = 0; j < width / 8; ++j)
                    d_k[j][2 * half] = d_k[j][2 * half + 1] = d_v[j][2 * half] = d_v[j][2 * half + 1] = 0;
            if (!has_value_scale || d.d_value_scale == nullptr) continue;
            Sum dot = 0;
#pragma unroll
            for (int j = 0; j < width / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const Sum d_entry = d_v[j][2 * half + e];
                    const auto v_entry = own_v[row * Tile::stride + 8 * j + accumulator_column() + e];
                    // The value of a key that no query sees may be NaN.
                    if (d_entry != Sum(0)) dot += d_entry * static_cast<Sum>(v_entry);
                }
            dot = row_reduce(dot, Plus());
            if (visible[half] == 0) dot = 0;
            if (lane_id() % 4 == 0 && first + row < a.keys)
                d.d_value_scale[(static_cast<Index>(block.b) * a.heads() + block.h) * a.keys + first + row] = dot;
        }
        Tile::store(own_k, d_k, a.scale, a.scale, block.rows(a, d.d_k), first, a.keys, a.dim_head, vectors);
        // A scale that is not finite makes d_k NaN or infinite, if a query sees the key. Then the row is recomputed. If
        // no query sees it, d_v is 0, and must stay so.
        const Sum factor[2] = {isfinite(value_scale[0]) ? value_scale[0] : Sum(1),
                               isfinite(value_scale[1]) ? value_scale[1] : Sum(1)};
        Tile::store(own_v, d_v, factor[0], factor[1], block.rows(a, d.d_v), first, a.keys, a.dim_head, vectors);
        unsigned recompute = rows_with_nan(d_k) | rows_with_nan(d_v);
        if (recompute == 0) return;
        __syncwarp();
        for (; recompute != 0; recompute &= recompute - 1) {
            const int row = __ffs(static_cast<int>(recompute)) - 1, key = first + row;
            const Sum scale = __shfl_sync(0xffffffffu, row < 8 ? value_scale[0] : value_scale[1], row % 8 * 4);
            if (key >= a.keys) continue;
            const Sum d_scale = key_gradient_row(
                block.rows(a, d.d_k)[key], block.rows(a, d.d_v)[key], k_rows[key], v_rows[key], q_rows, d_out_rows,
                MaskedKeyRange(position + row, reach, a.queries, nullptr), numbers.shift + block.of_queries(a),
                numbers.dot + block.of_queries(a), scale, a.scale, a.dim_head, head_bias.of_key(key));
            if (has_value_scale && d.d_value_scale != nullptr && lane_id() == 0)
                d.d_value_scale[(static_cast<Index>(block.b) * a.heads() + block.h) * a.keys + key] = d_scale;
        }
    };

    if constexpr (Shape::slides) {
        const auto first_row = [&](int p) { return block.first - a.first + p * Shape::stage_rows; };
        slide_window(
            ::min(tiles, (a.keys - block.first + Shape::tile_rows - 1) / Shape::tile_rows), load_keys,
            [&](int p) {
                Stage& stage = shared.stage[(p + Shape::stages) % Shape::stages];
                const int at = first_row(p);
                Tile::template load_whole<Shape::threads, Shape::stage_rows>(stage.first, q_rows, at, a.queries,
                                                                             a.dim_head);
                Tile::template load_whole<Shape::threads, Shape::stage_rows>(stage.second, d_out_rows, at, a.queries,
                                                                             a.dim_head);
                load_numbers(stage, at, Shape::stage_rows, a.queries);
            },
            [](int) {}, begin,
            [&](int t, bool rest) {
                const SlidingWindow window(t, rest, first_row(t - 1), position, reach, a.queries);
                process(window.groups_of(shared.stage), window, window.first);
            },
            end);
    } else {
        KeyRange range(block.first - a.first, Shape::tile_rows, reach, a.queries);
        head_bias.clip(range, block.first);
        const auto load = [&](int i) {
            Stage& stage = shared.stage[i % Shape::stages];
            const int at = range.begin + i * Shape::stage_rows;
            const int rows = ::min(Shape::stage_rows, (range.end - at + 15) / 16 * 16);
            Tile::template load<Shape::threads>(stage.first, q_rows, at, rows, range.end, a.dim_head, vectors);
            Tile::template load<Shape::threads>(stage.second, d_out_rows, at, rows, range.end, a.dim_head, vectors);
            load_numbers(stage, at, rows, range.end);
            end_copy_group();
        };
        load_keys(0);
        load(0);
        wait_for_copies<0>();
        __syncthreads();
        begin(0);
        pipeline<Shape::stages>((range.end - range.begin + Shape::stage_rows - 1) / Shape::stage_rows, load,
                                [&](int i) {
                                    const Stage& stage = shared.stage[i % Shape::stages];
                                    const int at = range.begin + i * Shape::stage_rows;
                                    process(
                                        [&](int group) {
                                            return Group<Stage>{stage, 16 * group};
                                        },
                                        Groups(position, at, Shape::stage_rows, range.end, reach), at);
                                });
        end();
    }
    bias_gradient.end();
}

}  // namespace colt5::cuda
