// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention/problem.cuh>
#include <colt5/cuda/kernel.cuh>
#include <colt5/cuda/ptx.cuh>
#include <colt5/cuda/tile_product.cuh>

namespace colt5::cuda {

/// Shared memory that a block can have on every architecture from sm_80 on.
inline constexpr int shared_bytes = 99 * 1024;

/// Rows of up to `width` entries in shared memory. Entries beyond the end of a row, and rows before 0 or from `limit`
/// on, are zeros.
template <typename Arithmetic, int width>
struct Tile {
    using T = typename Arithmetic::Scalar;
    static constexpr int stride = width + Arithmetic::row_padding;
    static constexpr int lanes = 16 / sizeof(T), per_row = width / lanes;

    /// Starts copying `rows` rows; all threads of the block take part.
    template <int threads>
    __device__ static void load(T* tile, const Rows<const T>& from, int first, int rows, int limit, int dim_head,
                                bool vectors) {
        const int thread = static_cast<int>(threadIdx.x);
        if (vectors) {
            static_assert(threads % per_row == 0);
            constexpr int step = threads / per_row;
            const int column = thread % per_row * lanes;
            const T* source = from[first + thread / per_row] + column;
            T* to = tile + thread / per_row * stride + column;
            const int real = column < dim_head ? limit - first : 0;
#pragma unroll 4
            for (int row = thread / per_row; row < rows; row += step) {
                copy_16_bytes(to, source, row < real && first + row >= 0);
                source += step * from.stride;
                to += step * stride;
            }
        } else {
            for (int item = thread; item < rows * width; item += threads) {
                const int row = item / width, column = item % width;
                const bool real = first + row >= 0 && first + row < limit && column < dim_head;
                tile[row * stride + column] = real ? from[first + row][column] : T(0);
            }
        }
    }
    /// The same for picked rows; `first` is not negative.
    template <int threads>
    __device__ static void load(T* tile, const PickedRows<const T>& from, int first, int rows, int limit, int dim_head,
                                bool vectors) {
        const int thread = static_cast<int>(threadIdx.x);
        if (vectors) {
            const int column = thread % per_row * lanes;
#pragma unroll 4
            for (int row = thread / per_row; row < rows; row += threads / per_row) {
                const bool real = first + row < limit && column < dim_head;
                const T* const source = from.rows.data + (real ? column : 0);
                copy_16_bytes(tile + row * stride + column,
                              real ? source + from.picks[first + row] * from.rows.stride : source, real);
            }
        } else {
            for (int item = thread; item < rows * width; item += threads) {
                const int row = item / width, column = item % width;
                const bool real = first + row < limit && column < dim_head;
                tile[row * stride + column] = real ? from[first + row][column] : T(0);
            }
        }
    }
    /// The same for a number of rows that is known at compile time. It is faster if all of them are real.
    template <int threads, int rows>
    __device__ static void load_whole(T* tile, const Rows<const T>& from, int first, int limit, int dim_head) {
        constexpr int step = threads / per_row;
        if (first < 0 || first + rows > limit || dim_head < width)
            return load<threads>(tile, from, first, rows, limit, dim_head, true);
        const int row = static_cast<int>(threadIdx.x) / per_row,
                  column = static_cast<int>(threadIdx.x) % per_row * lanes;
        const T* source = from[first + row] + column;
        const unsigned to = shared_address(tile + row * stride + column);
        static_assert(threads % per_row == 0 && rows % step == 0);
#pragma unroll
        for (int i = 0; i < rows / step; ++i) {
            asm volatile(
                "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i * step * stride * static_cast<int>(sizeof(T))),
                "l"(source)
                : "memory");
            source += step * from.stride;
        }
    }

    /// Writes a warp's 16 rows of accumulators to global memory. `upper` and `lower` are the factors of the lane's two
    /// rows. The warp's own 16 rows of shared memory are the staging buffer. Rows from `limit` on are not written.
    template <typename Sum>
    __device__ static void store(T* own, const Sum (&acc)[width / 8][4], Sum upper, Sum lower, const Rows<T>& to,
                                 int first, int limit, int dim_head, bool vectors) {
        __syncwarp();
        T* const corner = own + accumulator_row() * stride + accumulator_column();
#pragma unroll
        for (int j = 0; j < width / 8; ++j) {
            store_pair(corner + 8 * j, acc[j][0] * upper, acc[j][1] * upper);
            store_pair(corner + 8 * stride + 8 * j, acc[j][2] * lower, acc[j][3] * lower);
        }
        __syncwarp();
        if (vectors) {
            for (int item = lane_id(); item < 16 * per_row; item += warp_size) {
                const int row = item / per_row, column = item % per_row * lanes;
                if (first + row < limit && column < dim_head)
                    *reinterpret_cast<uint4*>(to[first + row] + column) =
                        *reinterpret_cast<const uint4*>(own + row * stride + column);
            }
        } else {
            for (int item = lane_id(); item < 16 * width; item += warp_size) {
                const int row = item / width, column = item % width;
                if (first + row < limit && column < dim_head) to[first + row][column] = own[row * stride + column];
            }
        }
    }
};

/// The warp's number in its block. The shuffle tells the compiler that it is uniform within the warp.
__device__ inline int warp_id() {
    return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / warp_size, 0);
}

}  // namespace colt5::cuda
