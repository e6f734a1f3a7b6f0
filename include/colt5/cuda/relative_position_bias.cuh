// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/relative_position_bias.hpp>

namespace colt5 {

namespace cuda {

/// One thread for each head and distance.
template <typename T>
__global__ void bias_by_distance(accumulate_t<T>* to, const T* table, RelativePositionBuckets buckets, Index heads,
                                 Index span) {
    const Index distances = 2 * span + 1;
    for (Index i = global_thread(); i < heads * distances; i += grid_threads()) {
        const Index h = i / distances, bucket = buckets.bucket(i % distances - span);
        to[i] = static_cast<accumulate_t<T>>(table[bucket * heads + h]);
    }
}

/// The bucket of each relative position from −span to span.
template <typename T>
__global__ void buckets_of_distances(T* to, RelativePositionBuckets buckets, Index span) {
    for (Index i = global_thread(); i < 2 * span + 1; i += grid_threads())
        to[i] = static_cast<T>(buckets.bucket(i - span));
}

inline constexpr int bias_threads = 256;

/// One block for each head. Threads find the buckets of as many distances as there are threads, then each adds those in
/// its own buckets to the table, in the order of distances.
template <typename Sum>
__global__ void add_bias_gradient(Sum* d_table, const Sum* d_by_distance, RelativePositionBuckets buckets, Index heads,
                                  Index span) {
    __shared__ TokenIndex bucket_of[bias_threads];
    const Index h = static_cast<Index>(blockIdx.x), distances = 2 * span + 1;
    const int thread = static_cast<int>(threadIdx.x);
    for (Index first = 0; first < distances; first += bias_threads) {
        if (first + thread < distances)
            bucket_of[thread] = static_cast<TokenIndex>(buckets.bucket(first + thread - span));
        __syncthreads();
        const int count = static_cast<int>(distances - first < bias_threads ? distances - first : bias_threads);
        for (Index bucket = thread; bucket < buckets.num_buckets; bucket += bias_threads) {
            Sum sum = d_table[bucket * heads + h];
            for (int i = 0; i < count; ++i)
                if (bucket_of[i] == bucket) sum += d_by_distance[h * distances + first + i];
            d_table[bucket * heads + h] = sum;
        }
        __syncthreads();
    }
}

/// Sums 32 neighbouring columns of parts (batch, heads, parts_each, stride) over batch and parts, in an order that
/// depends on their numbers alone; one block of 32 warps for each head and 32 columns. Assigns to (heads, columns);
/// with `over_lanes` adds the sum of the 32 columns to `to`, then (columns / 32, heads).
template <bool over_lanes, typename Sum>
__global__ void sum_bias_parts(Sum* to, const Sum* parts, Index batch, Index heads, Index parts_each, Index columns,
                               Index stride) {
    __shared__ Sum sums[warp_size][warp_size];
    const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / warp_size;
    const Index h = static_cast<Index>(blockIdx.x) % heads, group = static_cast<Index>(blockIdx.x) / heads;
    const Index column = group * warp_size + lane;
    Sum sum = 0;
    if (column < columns)
        for (Index row = warp; row < batch * parts_each; row += warp_size) {
            const Index b = quotient(row, parts_each), part = row - b * parts_each;
            sum += parts[((b * heads + h) * parts_each + part) * stride + column];
        }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0) return;
    sum = 0;
    for (int i = 0; i < warp_size; ++i) sum += sums[i][lane];
    if constexpr (over_lanes) {
        sum = warp_sum(sum);
        if (lane == 0) to[group * heads + h] += sum;
    } else if (column < columns) {
        to[h * columns + column] = sum;
    }
}

template <bool over_lanes, typename Sum>
void launch_sum_bias_parts(const Cuda& policy, Sum* to, const Sum* parts, Index batch, Index heads, Index parts_each,
                           Index columns, Index stride) {
    launch(policy, "sum_bias_parts", sum_bias_parts<over_lanes, Sum>, grid(heads * divide_up(columns, warp_size)),
           warp_size * warp_size, 0, to, parts, batch, heads, parts_each, columns, stride);
}

}  // namespace cuda

template <typename T>
void relative_position_bias_kernel(const Cuda& policy, MatrixView<accumulate_t<T>> by_distance,
                                   MatrixView<const T> table, const RelativePositionBuckets& buckets) {
    cuda::launch(policy, "bias_by_distance", cuda::bias_by_distance<T>,
                 cuda::blocks_for(by_distance.size(), cuda::bias_threads), cuda::bias_threads, 0, by_distance.data(),
                 table.data(), buckets, by_distance.extent(0), by_distance.extent(1) / 2);
}

template <typename T>
void relative_position_bias_vjp_kernel(const Cuda& policy, MatrixView<T> d_table, MatrixView<const T> d_by_distance,
                                       const RelativePositionBuckets& buckets) {
    const Index heads = d_by_distance.extent(0);
    cuda::launch(policy, "add_bias_gradient", cuda::add_bias_gradient<T>, cuda::grid(heads), cuda::bias_threads, 0,
                 d_table.data(), d_by_distance.data(), buckets, heads, d_by_distance.extent(1) / 2);
}

}  // namespace colt5
