// SPDX-License-Identifier: MIT
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include <colt5/core/error.hpp>
#include <colt5/core/scalar.hpp>
#include <colt5/core/tensor.hpp>
#include <colt5/cuda/policy.cuh>

/// What most kernels need: launches, grids, and reductions over warps and blocks in a fixed order.
namespace colt5::cuda {

inline constexpr int warp_size = 32;

/// Starts `kernel` on the policy's stream; does nothing when there are no blocks.
template <typename... Parameters, typename... Arguments>
void launch(const Cuda& policy, const char* name, void (*kernel)(Parameters...), dim3 blocks, int threads,
            std::size_t shared_bytes, const Arguments&... arguments) {
    if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
    const DeviceGuard guard(policy.device());
    if (shared_bytes > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
              name);
    kernel<<<blocks, static_cast<unsigned>(threads), shared_bytes, policy.stream()>>>(arguments...);
    check_launch(name);
}

/// The number of multiprocessors of the policy's device.
inline int multiprocessors(const Cuda& policy) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, policy.device()), "cudaDeviceGetAttribute");
    return count;
}

/// The largest number of blocks of a launch, all in the first dimension; the other dimensions are limited to 65,535.
inline constexpr Index most_blocks = std::numeric_limits<std::int32_t>::max();

inline dim3 grid(Index blocks) {
    expect_value(blocks <= most_blocks, "blocks of a kernel", "at most 2147483647 on a GPU", blocks);
    return dim3(static_cast<unsigned>(blocks));
}
/// A grid of `blocks_each` blocks for each of `rows` rows. The kernel finds its row and block by RowBlock.
inline dim3 grid_of_rows(Index rows, Index blocks_each) {
    expect_value(rows == 0 || blocks_each <= most_blocks / rows, "blocks of a kernel",
                 colt5::detail::concat({"at most 2147483647 on a GPU, in rows times ", std::to_string(blocks_each)}),
                 rows);
    return grid(rows * blocks_each);
}
/// The row of a block of grid_of_rows, and its number among the blocks of the row.
struct RowBlock {
    unsigned row, block;

    __device__ explicit RowBlock(Index blocks_each) {
        const auto each = static_cast<unsigned>(blocks_each);
        row = blockIdx.x / each;
        block = blockIdx.x - row * each;
    }
};

/// The grid of a grid-stride loop over `count` items: at most so many blocks that they fill an H100 several times.
inline dim3 blocks_for(Index count, int threads) {
    constexpr Index most = 132 * 16;
    return grid(std::min(most, divide_up(count, threads)));
}

__device__ inline Index global_thread() {
    return static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline Index all_threads() {
    return static_cast<Index>(gridDim.x) * blockDim.x;
}

/// a / b of non-negative numbers, by a division of 32 bits where possible: divisions of 64 bits are slow.
__device__ inline Index quotient(Index a, Index b) {
    if ((a | b) >> 32 == 0) return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
    return a / b;
}

/// The lane of the calling thread in its warp.
__device__ inline int lane_id() {
    return static_cast<int>(threadIdx.x) % warp_size;
}

struct Plus {
    template <typename T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
};
struct Greater {
    template <typename T>
    __device__ T operator()(T a, T b) const {
        return a > b ? a : b;
    }
};

struct Smaller {
    template <typename T>
    __device__ T operator()(T a, T b) const {
        return a < b ? a : b;
    }
};

/// Reduces the values of a warp. Every lane gets the result.
template <typename T, typename Combine>
__device__ T warp_reduce(T value, Combine combine) {
    for (int offset = warp_size / 2; offset > 0; offset /= 2)
        value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
    return value;
}
template <typename T>
__device__ T warp_sum(T value) {
    return warp_reduce(value, Plus());
}
template <typename T>
__device__ T warp_max(T value) {
    return warp_reduce(value, Greater());
}

/// Reduces the values of a block of up to 1024 threads, a multiple of 32. Every thread gets the result. All threads
/// must call it; `identity` is the identity element of `combine`.
template <typename T, typename Combine>
__device__ T block_reduce(T value, T identity, Combine combine) {
    __shared__ T of_warp[warp_size];
    const int warp = static_cast<int>(threadIdx.x) / warp_size, lane = lane_id();
    const int warps = static_cast<int>(blockDim.x) / warp_size;
    value = warp_reduce(value, combine);
    __syncthreads();  // of_warp may still be read from a call before
    if (lane == 0) of_warp[warp] = value;
    __syncthreads();
    return warp_reduce(lane < warps ? of_warp[lane] : identity, combine);
}
template <typename T>
__device__ T block_sum(T value) {
    return block_reduce(value, T(0), Plus());
}
template <typename T>
__device__ T block_max(T value) {
    return block_reduce(value, -std::numeric_limits<T>::infinity(), Greater());
}

}  // namespace colt5::cuda
