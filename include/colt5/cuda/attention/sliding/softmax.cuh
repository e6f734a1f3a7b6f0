// SPDX-License-Identifier: MIT
#pragma once

#include <limits>

#include <colt5/cuda/attention/online_softmax.cuh>
#include <colt5/cuda/attention/sliding/block.cuh>

/// The softmax warpgroup of sliding_backward.cuh.
namespace colt5::cuda::sliding {

/// Whether the query in row `row` of its tile sees a single key of the three tiles, so that its logit has no gradient.
__device__ inline bool sees_one_key(const VisibleKeys (&visible)[neighbours], const Reach& reach, int row) {
    row = rarely_needed(row);
    const int first = tile_rows + row - reach.before, last = tile_rows + row + reach.after;
    int count = 0;
#pragma unroll
    for (int i = 0; i < 2 * neighbours; ++i) {
        const int begin = ::max(first - 32 * i, 0), end = ::min(last - 32 * i, 31);  // bits of the word
        if (begin <= end) count += __popc(visible[i / 2].words[i % 2] & (0xffffffffu >> (31 - end)) >> begin << begin);
    }
    return count == 1;
}

/// Replaces products q·k by p.
__device__ inline void softmax(float (&s)[32], float to_log2, const float2& shift) {
#pragma unroll
    for (int i = 0; i < 32; ++i) s[i] = fast_exp2(::fmaf(s[i], to_log2, -of_row(shift, i)));
}

/// The same with shared.bias of the first entry's distance at `bias`, which hides keys out of reach.
template <int distance>
__device__ void softmax(float (&s)[32], float to_log2, const float2& shift, const float* bias) {
#pragma unroll
    for (int i = 0; i < 32; ++i)
        s[i] = fast_exp2(::fmaf(s[i], to_log2, bias[distance + from_first(i)] - of_row(shift, i)));
}

/// D = Σ p dp of both rows.
__device__ inline float2 dot_of(const float (&p)[neighbours][32], const float (&dp)[neighbours][32]) {
    float dots[4] = {0, 0, 0, 0};  // which do not wait for each other
#pragma unroll
    for (int j = 0; j < neighbours; ++j)
#pragma unroll
        for (int i = 0; i < 32; ++i) dots[i % 4] = ::fmaf(p[j][i], dp[j][i], dots[i % 4]);
    return {row_reduce(dots[0] + dots[1], Plus()), row_reduce(dots[2] + dots[3], Plus())};
}

/// Sets the entries of hidden pairs to 0.
template <int distance>
__device__ void clear_hidden(float (&tile)[32], const Reach& reach, const VisibleKeys& visible, const TileThread& at) {
    set_out_of_reach<distance>(tile, 0, reach, ThreadReach(reach, at));
    set_invisible(tile, 0, visible, at);
}

/// Writes p and ds of each step to shared memory, and D of the segment's queries to `dots`, of its head.
template <bool has_bias, typename T>
__device__ void softmax_warpgroup(Shared& shared, const Attention<T>& a, float* dots, const AttentionBlock<T>& block,
                                  const Segment& segment) {
    const TileThread at;
    const Reach reach = Reach::of_query(a);
    const ThreadReach of_thread(reach, at);
    constexpr float infinity = std::numeric_limits<float>::infinity();
    const float to_log2 = a.scale * static_cast<float>(log2_e);
    const float* const bias = shared.bias + bias_center + at.pair - at.upper;
    for (int i = 0; i < neighbours - 1; ++i) {
        shared.keys_full[i].wait(0);
        shared.values_full[i].wait(0);
    }
    for (int i = 0; i < segment.steps; ++i) {
        const int tile = segment.first_step + i;
        const Ring<key_stages> key{i}, last_key = key + 2;
        const Ring<value_stages> value{i}, last_value = value + 2;
        const Ring<query_stages> query{i};
        const Ring<weight_buffers> weights{i};
        float p[neighbours][32], dp[neighbours][32];
        shared.keys_full[last_key.stage].wait(last_key.parity);
        shared.queries_full[query.stage].wait(query.parity);
        shared.values_full[last_value.stage].wait(last_value.parity);
        const VisibleKeys visible[neighbours] = {shared.visible[key.stage], shared.visible[(key + 1).stage],
                                                 shared.visible[last_key.stage]};
        const float2 shift = {shared.shift[query.stage][at.upper], shared.shift[query.stage][at.upper + 8]};
        hopper::fence_products();
#pragma unroll
        for (int j = 0; j < neighbours; ++j) {
#pragma unroll
            for (int k = 0; k < dim / 16; ++k)
                hopper::product_64<T, false, false>(p[j], shared.q[query.stage].columns(k),
                                                    shared.k[(key + j).stage].columns(k), k > 0);
            hopper::commit_products();
        }
#pragma unroll
        for (int j = 0; j < neighbours; ++j)
#pragma unroll
            for (int k = 0; k < dim / 16; ++k)
                hopper::product_64<T, false, false>(dp[j], shared.d_out[query.stage].columns(k),
                                                    shared.v[(value + j).stage].columns(k), k > 0);
        hopper::commit_products();
        // The weights of a key tile are computed while the products of the next ones run.
        for_each_tile([&]<int j>() {
            hopper::wait_products<neighbours - j>();
            hopper::expect_written(p[j]);
            constexpr int distance = (j - 1) * tile_rows;
            if constexpr (!has_bias) set_out_of_reach<distance>(p[j], -infinity, reach, of_thread);
            set_invisible(p[j], -infinity, visible[j], at);
            if constexpr (has_bias)
                softmax<distance>(p[j], to_log2, shift, bias);
            else
                softmax(p[j], to_log2, shift);
        });
        shared.weights_empty[weights.stage].wait(weights.parity ^ 1);
#pragma unroll
        for (int j = 0; j < neighbours; ++j) write_tile<T>(shared.p[weights.stage][j], p[j], at);
        hopper::wait_products<0>();
#pragma unroll
        for (int j = 0; j < neighbours; ++j) hopper::expect_written(dp[j]);
        arrive(shared.queries_empty[query.stage]);
        arrive(shared.keys_empty[key.stage]);
        arrive(shared.values_empty[value.stage]);
        const bool all_visible = visible[0].all() && visible[1].all() && visible[2].all();
        if (!a.sees_zeros && (reach.after == 0 || !all_visible)) {
            // A single key: with p = 1, D is its dp, and ds is exactly 0.
            const bool upper = sees_one_key(visible, reach, at.upper),
                       lower = sees_one_key(visible, reach, at.upper + 8);
#pragma unroll
            for (int j = 0; j < neighbours; ++j)
#pragma unroll
                for (int e = 0; e < 32; ++e)
                    if ((e % 4 < 2 ? upper : lower) && p[j][e] > 0) p[j][e] = 1;  // NaN stays
            __syncwarp();
        }
        float2 dot = dot_of(p, dp);
        // The gradient of a bias needs ds = 0 of hidden pairs even if keys or values are not finite. Without a bias,
        // the rows become NaN, and nan_rows.cuh computes them again.
        bool has_nan = false;
        if constexpr (has_bias) {
            has_nan = __any_sync(0xffffffffu, !((dot.x + dot.y) * 0.0f == 0));
            if (has_nan) {
                for_each_tile([&]<int j>() {
                    clear_hidden<(j - 1) * tile_rows>(p[j], reach, visible[j], at);
                    clear_hidden<(j - 1) * tile_rows>(dp[j], reach, visible[j], at);
                });
                dot = dot_of(p, dp);
            }
        }
        for_each_tile([&]<int j>() {
#pragma unroll
            for (int e = 0; e < 32; ++e) dp[j][e] = p[j][e] * (dp[j][e] - of_row(dot, e));
            if (has_nan) clear_hidden<(j - 1) * tile_rows>(dp[j], reach, visible[j], at);
            write_tile<T>(shared.ds[weights.stage][j], dp[j], at);
        });
        hopper::fence_shared_stores();
        arrive(shared.weights_full[weights.stage]);
        if (tile >= segment.first && tile < segment.end && at.lane % 4 == 0) {
            const int row = tile * tile_rows + at.upper;
            if (row < a.queries) dots[row] = dot.x;
            if (row + 8 < a.queries) dots[row + 8] = dot.y;
        }
    }
}

}  // namespace colt5::cuda::sliding
