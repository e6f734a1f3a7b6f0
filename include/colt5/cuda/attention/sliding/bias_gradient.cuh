// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <colt5/cuda/attention/bias_parts.cuh>
#include <colt5/cuda/attention/sliding/block.cuh>

/// The gradient of a relative position bias in sliding_backward.cuh.
namespace colt5::cuda::sliding {

/// Two warps of the producer warpgroup sum ds along diagonals. They read the tiles that the softmax warpgroup writes,
/// in 16 bits, as matrices of 8 × 8. Matrix u of a row of matrices has the keys that are 8 (u − 8) tokens after its
/// queries and on: u is at most 16, since the reach is at most 64. Warp w of the two has every other row of matrices.
struct BiasGradientWarp {
    static constexpr int warps = 2, matrices = 2 * tile_rows / 8 + 1;
    using Sums = float[warps][matrices][8][8];  // by query and key of a matrix
    static_assert(sizeof(Sums) <= 2 * sizeof(SwizzledTile));

    /// The entries of a part in global memory.
    static constexpr int part_entries(int span) { return 2 * span + 1; }

    const int warp;
    // A lane's two entries of each matrix. The loops below take four matrices at a time, and only their sums are in
    // registers, of which this warpgroup has few.
    float sums[matrices / 4][8] = {}, last[2] = {};

    __device__ explicit BiasGradientWarp(int warp_) : warp(warp_) {}

    /// Adds one step's ds, of own queries.
    template <typename T>
    __device__ void add(const SwizzledTile (&ds)[neighbours]) {
        const int lane = lane_id();
#pragma unroll 1
        for (int group = 0; group < matrices / 4; ++group) {
            float sum[8];
#pragma unroll
            for (int e = 0; e < 8; ++e) sum[e] = sums[group][e];
#pragma unroll 1
            for (int row = warp; row < 8; row += warps)
                add_matrices<T>(ds, row, row + 4 * group + lane / 8, [&](int e, float entry) { sum[e] += entry; });
#pragma unroll
            for (int e = 0; e < 8; ++e) sums[group][e] = sum[e];
        }
        const int row = warps * (lane / 8) + warp;
        add_matrices<T>(ds, row, row + matrices - 1, [&](int e, float entry) { last[e % 2] += entry; });
    }
    /// Writes the block's part of the gradient, by way of `shared`, which nothing else uses any more.
    __device__ void end(Sums& shared, const Reach& reach, const WindowBias<float>& bias, float* part) const {
        const int lane = lane_id(), query = lane / 4, key = 2 * (lane % 4);
#pragma unroll 1
        for (int i = 0; i < matrices - 1; ++i)
            for (int e = 0; e < 2; ++e) shared[warp][i][query][key + e] = sums[i / 4][2 * (i % 4) + e];
        for (int e = 0; e < 2; ++e) shared[warp][matrices - 1][query][key + e] = last[e];
        hopper::sync_some<warps * warp_size>(2);
        for (int i = warp * warp_size + lane; i < part_entries(bias.span); i += warps * warp_size) {
            // The outermost entries have all distances beyond the span, too.
            const int begin = ::max(-reach.before, i == 0 ? -tile_rows : i - bias.span);
            const int end = ::min(reach.after, i == 2 * bias.span ? tile_rows : i - bias.span);
            float sum = 0;
#pragma unroll 1
            for (int distance = begin; distance <= end; ++distance)
                for (int w = 0; w < warps; ++w)
#pragma unroll 1
                    for (int row = 0; row < 8; ++row) {
                        const int at = distance + tile_rows + row;
                        sum += shared[w][at / 8][row][at % 8];
                    }
            part[i] = sum;
        }
    }

private:
    /// Calls run(e, entry) with the lane's entries of four matrices, of which lane l gives row l % 8 of matrix l / 8:
    /// that at `row` and `column`, counted in matrices.
    template <typename T, typename Run>
    __device__ static void add_matrices(const SwizzledTile (&ds)[neighbours], int row, int column, const Run& run) {
        const int in_matrix = lane_id() % 8, unit = column % 8 ^ in_matrix;
        std::uint32_t pairs[4];
        load_matrices(pairs, ds[column / 8].bytes + (8 * row + in_matrix) * 128 + unit * 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack_pair<T>(pairs[i]);
            run(2 * i, pair.x);
            run(2 * i + 1, pair.y);
        }
    }
};

/// What the two warps do.
template <typename T>
__device__ void sum_bias_gradient(Shared& shared, const Attention<T>& a, const AttentionBlock<T>& block,
                                  const Segment& segment, const WindowBias<float>& bias, int warp) {
    BiasGradientWarp gradient(warp);
    for (int i = 0; i < segment.steps; ++i) {
        const Ring<weight_buffers> weights{i};
        const int tile = segment.first_step + i;
        shared.weights_full[weights.stage].wait(weights.parity);
        if (tile >= segment.first && tile < segment.end) gradient.add<T>(shared.ds[weights.stage]);
        arrive(shared.weights_empty[weights.stage]);
    }
    // v may be overwritten: all of its loads have landed and been read before the last ds was written.
    const Index segments = gridDim.x / static_cast<unsigned>(a.heads());
    const Index part = (static_cast<Index>(block.b) * a.heads() + block.h) * segments + block.first;
    gradient.end(*reinterpret_cast<BiasGradientWarp::Sums*>(shared.v), Reach::of_query(a), bias,
                 bias.parts + part * BiasGradientWarp::part_entries(bias.span));
}

}  // namespace colt5::cuda::sliding
