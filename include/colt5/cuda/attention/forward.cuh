// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention/bias.cuh>
#include <colt5/cuda/attention/dispatch.cuh>
#include <colt5/cuda/attention/online_softmax.cuh>
#include <colt5/cuda/attention/pipeline.cuh>
#include <colt5/cuda/attention/single_rows.cuh>
#include <colt5/cuda/attention/sliding_forward.cuh>

namespace colt5::cuda {

template <typename Arithmetic, int width, Staging staging>
struct ForwardShape : KernelShape<Arithmetic, width, staging, forward_tuning<Arithmetic, width, staging>(), 1> {
    using Base = KernelShape<Arithmetic, width, staging, forward_tuning<Arithmetic, width, staging>(), 1>;
    struct Shared {
        typename Base::T q[Base::tile_buffers][Base::tile_rows * Base::Tile::stride];
        typename Base::Stage stage[Base::stages];
    };
    static_assert(sizeof(Shared) <= shared_bytes);
};

/// Attention by online softmax over the key range of a tile of queries. A thread block owns `tiles` tiles of one head:
/// more than one only with Staging::sliding. log_sum_exp may be null.
template <typename Shape, typename Bias>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks_per_multiprocessor)
    attention_forward(const Attention<typename Shape::T> a, const Bias bias, typename Shape::T* out,
                      typename Shape::Sum* log_sum_exp, int tiles) {
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

    const int warp = warp_id();
    const AttentionBlock<T> block(a, Shape::tile_rows * tiles);
    if (block.is_beyond(a)) return;
    const Rows<const T> q_rows = block.rows(a, a.q);
    const HeadBias<T, Bias> head_bias(a, block, bias);
    const Sum to_log2 = a.scale * static_cast<Sum>(log2_e);
    const Reach reach = Reach::of_query(a);
    const auto load_queries = [&](int tile) {
        load_tile_rows<Shape>(shared.q[tile % Shape::tile_buffers], q_rows, block.first + tile * Shape::tile_rows,
                              a.queries, a);
    };

    // State of the warp's 16 queries of the current tile. `first` is the number of the first query, `position` its
    // place among the keys, `own` its row in shared memory. Each thread holds entries of two rows, 8 apart, which
    // `half` tells apart.
    int first = 0, position = 0;
    T* own = nullptr;
    Left<Arithmetic, width, true> q;
    OnlineSoftmax<Sum, width> softmax;
    const auto begin = [&](int tile) {
        first = block.first + tile * Shape::tile_rows + 16 * warp;
        position = a.first + first;
        own = shared.q[tile % Shape::tile_buffers] + 16 * warp * Tile::stride;
        q = Left<Arithmetic, width, true>(own);
        softmax.reset();
        return position;
    };
    // Called by stream_keys, which documents the arguments; `at` is its group_at.
    const auto process = [&](const auto& at, const Groups& range, int first_key, bool incomplete) {
        const auto process_groups = [&](auto count, int group) {
            constexpr int groups = decltype(count)::value;
            Sum score[groups][2][4];
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                const auto [stage, row] = at(group + c);
                multiply_transposed(score[c], q, stage.first + row * Tile::stride);
            }
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                const int columns = first_key + 16 * (group + c);
                head_bias.add_to_queries(score[c], first, columns);
                const GroupMask<RowsAre::queries, HeadBias<T, Bias>> mask{reach, head_bias, first, position, columns};
                const auto hide = [&](int j, int e) { score[c][j][e] = -infinity; };
                mask.hide_by_position(hide);
                if (incomplete) mask.hide_masked(at(group + c).stage.visible.of_group(at(group + c).row), hide);
            }
            softmax.weigh(score, to_log2);
            if (!Shape::slides && a.value_scale != nullptr)
#pragma unroll
                for (int c = 0; c < groups; ++c) {
                    const auto& [stage, first_row] = at(group + c);
                    const Sum* const scales = stage.of_row[0] + first_row;
                    for_each_entry([&](int j, int e, int, int column) { score[c][j][e] *= scales[column]; });
                }
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                const auto [stage, row] = at(group + c);
                Arithmetic::template multiply<width>(softmax.sum, score[c], stage.second + row * Tile::stride);
            }
        };
        for_each_step<Shape::groups_at_once>(range, process_groups);
    };
    const auto end = [&] {
        Sum factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Sum all = row_reduce(softmax.total[half], Plus());
            factor[half] = all > Sum(0) ? reciprocal(all) : Sum(0);
            const int query = first + accumulator_row() + 8 * half;
            if (log_sum_exp != nullptr && lane_id() % 4 == 0 && query < a.queries)
                log_sum_exp[block.of_queries(a) + query] = softmax.largest[half] * a.scale + ::log(all);
        }
        // The warp's queries in shared memory are no longer needed: their rows are the staging buffer of the outputs.
        Tile::store(own, softmax.sum, factor[0], factor[1], block.rows(a, a.out.with(out)), first, a.queries,
                    a.dim_head, Shape::slides || a.vectors);
        // A key that the query does not see (masked, out of reach or hidden) has weight 0, but 0 · NaN makes the whole
        // row NaN. Such rows are recomputed without these keys, over the first result. See single_rows.cuh.
        unsigned recompute = rows_with_nan(softmax.sum);
        if (recompute == 0) return;
        __syncwarp();
        for (; recompute != 0; recompute &= recompute - 1) {
            const int row = __ffs(static_cast<int>(recompute)) - 1;
            if (first + row < a.queries)
                attend_row(
                    block.rows(a, a.out.with(out))[first + row], q_rows[first + row],
                    block.template key_rows<Shape::picked>(a, a.k), block.template key_rows<Shape::picked>(a, a.v),
                    MaskedKeyRange(position + row, reach, head_bias.keys_seen(first + row, a.keys), block.mask(a)),
                    block.value_scale(a), to_log2, a.dim_head, head_bias.of_query(first + row));
        }
    };

    const int keys = head_bias.most_keys_seen(block.first, Shape::tile_rows, a.keys, Shape::stage_rows);
    stream_keys<Shape>(a, block, shared.stage, tiles, keys, load_queries, begin, process, end);
}

/// Assigns `out`, which has the layout of a.out, and log_sum_exp (batch, heads, queries) unless it is null.
template <KeyRows keys, Index head, typename T, typename Bias>
void run_attention_forward(const Cuda& policy, const Attention<T>& a, const Bias& bias, T* out,
                           accumulate_t<T>* log_sum_exp) {
    if constexpr (keys == KeyRows::in_window && HalfPrecision<T> && (head == sliding::dim || head == dynamic))
        if (sliding::supports(policy, a, sliding::attention_forward<T, Bias>, sliding::ForwardShared::threads))
            return sliding::launch_attention_forward(policy, a, bias, out, log_sum_exp);
    with_staging<keys, head, T>(policy, a, [&]<typename Arithmetic, int width, Staging staging>() {
        using Shape = ForwardShape<Arithmetic, width, staging>;
        const int tiles = tiles_of_block<Shape>(policy, a, a.queries, Shape::tile_rows);
        launch(policy, "attention_forward", attention_forward<Shape, Bias>,
               attention_grid(a, a.queries, Shape::tile_rows * tiles), Shape::threads, sizeof(typename Shape::Shared),
               a, bias, out, log_sum_exp, tiles);
    });
}

}  // namespace colt5::cuda
