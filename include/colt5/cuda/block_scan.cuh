// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/launch.cuh>

/// Prefix reductions over the lanes of a warp and the threads of a block, in a fixed order.
namespace colt5::cuda {

/// The values of the lanes up to this one, combined.
template <typename T, typename Combine>
__device__ T warp_inclusive_scan(T value, Combine combine) {
    const int lane = lane_id();
    for (int offset = 1; offset < warp_size; offset *= 2) {
        const T before = __shfl_up_sync(0xffffffffu, value, offset);
        if (lane >= offset) value = combine(value, before);
    }
    return value;
}

/// Σ of the values of the threads up to this one. All threads of the block call it.
template <int threads, typename T>
__device__ T block_inclusive_sum(T value) {
    constexpr int warps = threads / warp_size;
    __shared__ T of_warp[warps];
    const int warp = static_cast<int>(threadIdx.x) / warp_size, lane = lane_id();
    value = warp_inclusive_scan(value, Plus());
    __syncthreads();  // of_warp may still be read from a call before
    if (lane == warp_size - 1) of_warp[warp] = value;
    __syncthreads();
    const T of_warps = warp_inclusive_scan(of_warp[lane % warps], Plus());
    const T before = __shfl_sync(0xffffffffu, of_warps, ::max(warp - 1, 0));
    return warp > 0 ? before + value : value;
}

}  // namespace colt5::cuda
