// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <colt5/cuda/kernel.cuh>
#include <colt5/cuda/ptx.cuh>
#include <colt5/cuda/tile_product.cuh>

/// What the kernels of local and dense attention share, forward and backward: the memory layout of a problem, and tiles
/// of rows in shared memory.
namespace colt5::cuda {

/// The rows of one head: row i starts at data + i · stride.
template <typename T>
struct Rows {
    T* data;
    Index stride;

    __device__ T* operator[](int i) const { return data + i * stride; }
};

/// Where the rows of each head start, given its batch entry, its route and its number within the route.
template <typename T>
struct Heads {
    T* data;
    Index batch, route, head, token;  // strides

    __device__ Rows<T> at(int b, int r, int h) const { return {data + b * batch + r * route + h * head, token}; }
    template <typename U>
    COLT5_HOST_DEVICE Heads<U> with(U* other) const {
        return {other, batch, route, head, token};
    }
};

/// One problem: the queries, keys and values of every head. Local attention has a finite reach, dense attention none.
template <typename T>
struct Attention {
    using Sum = accumulate_t<T>;
    static constexpr int everything = 1 << 29;

    Heads<const T> q, k, v, out;
    int batch, routes, per_route, queries, keys, dim_head;
    // Query i attends to key j if −reach <= j − (first + i) <= ahead; `ahead` is `reach`, or 0 for causal attention.
    int reach, ahead;
    int first;                // position of the first query among the keys; 0 for dense attention
    const bool* mask;         // (batch, routes, keys) or null
    const Sum* value_scale;   // (batch, routes, keys) or null
    Sum scale;                // 1 / √dim_head
    bool vectors;             // the address and the length of every row are multiples of 16 bytes
    bool sees_zeros = false;  // queries also attend to keys of 0 behind the sequence; log-sum-exps have them

    COLT5_HOST_DEVICE int heads() const { return routes * per_route; }
};

/// Converts an extent of a problem to 32 bits. The limit leaves room for a position plus a reach.
template <typename T>
int attention_extent(const char* name, Index extent) {
    expect_value(extent <= Attention<T>::everything, name, "at most 536870912 in attention on a GPU", extent);
    return static_cast<int>(extent);
}

/// The grid of AttentionBlock: one block for each tile of `tile_rows` of the `rows` rows of every head. The batch has
/// dimensions of its own, so that kernels need no division, which costs registers.
template <typename T>
dim3 attention_grid(const Attention<T>& a, Index rows, Index tile_rows) {
    dim3 blocks = grid(divide_up(rows, tile_rows) * a.heads());
    blocks.z = static_cast<unsigned>(std::max(Index{1}, divide_up(a.batch, 65535)));
    blocks.y = static_cast<unsigned>(divide_up(a.batch, blocks.z));
    return blocks;
}

/// What one block owns: a head of one sequence, and its queries or keys from `first` on. Consecutive blocks have
/// consecutive heads, so that blocks that run at the same time read neighbouring memory.
template <typename T>
struct AttentionBlock {
    int b, h, route, first;

    __device__ AttentionBlock(const Attention<T>& a, int tile_rows) {
        const int item = static_cast<int>(blockIdx.x), heads = a.heads();
        b = static_cast<int>(blockIdx.y + blockIdx.z * gridDim.y);
        h = item % heads;
        route = a.routes == 1 ? 0 : h / a.per_route;
        first = item / heads * tile_rows;
    }
    /// Whether the block has no sequence. The batch takes two dimensions of the grid, 65,535 by 65,535 at most, and
    /// need not fill them.
    __device__ bool is_beyond(const Attention<T>& a) const { return b >= a.batch; }
    template <typename U>
    __device__ Rows<U> rows(const Attention<T>& a, const Heads<U>& heads) const {
        return heads.at(b, route, h - route * a.per_route);
    }
    /// The mask of the block's keys, false where masked, and the factors of their values; null if there are none.
    __device__ const bool* mask(const Attention<T>& a) const {
        return a.mask != nullptr ? a.mask + of_keys(a) : nullptr;
    }
    __device__ const typename Attention<T>::Sum* value_scale(const Attention<T>& a) const {
        return a.value_scale != nullptr ? a.value_scale + of_keys(a) : nullptr;
    }
    /// Offsets of the block's row in (batch, routes, keys), and in (batch, heads, queries).
    __device__ Index of_keys(const Attention<T>& a) const {
        return (static_cast<Index>(b) * a.routes + route) * a.keys;
    }
    __device__ Index of_queries(const Attention<T>& a) const {
        return (static_cast<Index>(b) * a.heads() + h) * a.queries;
    }
};

/// How many positions before and after its own a row attends to: a query to keys, or for the key gradient a key to
/// queries, which is the other way round.
struct Reach {
    int before, after;

    template <typename T>
    __device__ static Reach of_query(const Attention<T>& a) {
        return {a.reach, a.ahead};
    }
    template <typename T>
    __device__ static Reach of_key(const Attention<T>& a) {
        return {a.ahead, a.reach};
    }
    /// Whether 16 rows from position `rows` on all attend to the 16 columns from `columns` on.
    __device__ bool has_all(int rows, int columns) const {
        const int distance = columns - rows;
        return distance >= 15 - before && distance <= after - 15;
    }
    /// Whether a row does not attend to the column at this distance after it.
    __device__ bool excludes(int distance) const {
        return static_cast<unsigned>(distance + before) > static_cast<unsigned>(before + after);
    }
};

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

/// a · b, rounded: the compiler must not fuse it with an addition, so that it is the same number everywhere.
__device__ inline float rounded_product(float a, float b) {
    return __fmul_rn(a, b);
}
__device__ inline double rounded_product(double a, double b) {
    return __dmul_rn(a, b);
}

/// 2^x; in float by the hardware's approximation.
__device__ inline float fast_exp2(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}
__device__ inline double fast_exp2(double x) {
    return exp2(x);
}
/// 1 / x for x >= 1; in float by the hardware's approximation.
__device__ inline float reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
__device__ inline double reciprocal(double x) {
    return 1 / x;
}
inline constexpr double log2_e = 1.4426950408889634074;

/// Combines the values of the four lanes that share a row of accumulators.
template <typename T, typename Combine>
__device__ T row_reduce(T value, Combine combine) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, 1));
    return combine(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

/// The warp's number in its block. The shuffle tells the compiler that it is uniform within the warp.
__device__ inline int warp_id() {
    return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / warp_size, 0);
}

/// Calls `run.template operator()<width>()` with the narrowest tile that holds rows of dim_head entries.
template <typename Run>
void with_width(Index dim_head, const Run& run) {
    expect_value(dim_head <= 128, "dim_head", "at most 128 on a GPU", dim_head);
    if (dim_head <= 32)
        run.template operator()<32>();
    else if (dim_head <= 64)
        run.template operator()<64>();
    else
        run.template operator()<128>();
}

/// Calls `run.template operator()<Arithmetic>()` with the arithmetic that multiplies values of type T under the policy.
template <typename T, typename Run>
void with_arithmetic(const Cuda& policy, const Run& run) {
    if constexpr (HalfPrecision<T>) {
        run.template operator()<HalfProduct<T>>();
    } else if constexpr (std::is_same_v<T, float>) {
        if (policy.math() == MathMode::tf32)
            run.template operator()<Tf32Product>();
        else
            run.template operator()<ScalarProduct<float>>();
    } else {
        run.template operator()<ScalarProduct<T>>();
    }
}

inline bool is_aligned(const void* data) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

}  // namespace colt5::cuda
