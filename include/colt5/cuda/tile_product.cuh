// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <colt5/core/scalar.hpp>
#include <colt5/cuda/kernel.cuh>
#include <colt5/cuda/ptx.cuh>

/// Matrix products of a warp: 16 rows on the left, tiles in shared memory on the right, accumulators in registers.
///
/// Accumulators have the layout of the tensor cores in every arithmetic: of a 16 × 8 block j, lane 4g + t has
///
///     acc[j][0], acc[j][1]: row g,      columns 8j + 2t, 8j + 2t + 1
///     acc[j][2], acc[j][3]: row g + 8,  the same columns
///
/// An arithmetic is a class with
///
///     Scalar, Sum                            types of the entries of tiles and of accumulators
///     has_tensor_cores                       whether tensor cores multiply
///     row_padding                            entries after each row of a tile, against bank conflicts
///     operand(x)                             an entry as products round it
///     Left<width, resident>                  16 rows of a tile, kept in registers if `resident`
///     multiply_transposed(acc, left, tile)   acc (16 × 16) = left · tileᵀ, tile (16 × width) in shared memory
///     multiply(acc, weights, tile)           acc (16 × width) += weights (16 × 16, accumulators) · tile (16 × width)
namespace colt5::cuda {

/// The row of acc[j][0]; that of acc[j][2] is 8 further.
__device__ inline int accumulator_row() {
    return lane_id() / 4;
}
/// The column of acc[0][0].
__device__ inline int accumulator_column() {
    return lane_id() % 4 * 2;
}

/// Calls `run(j, e, row, column)` for the entries of a 16 × 16 accumulator that a lane has.
template <typename Run>
__device__ void for_each_entry(const Run& run) {
    const int row = accumulator_row(), column = accumulator_column();
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) run(j, e, row + e / 2 * 8, column + 8 * j + e % 2);
}

/// Loads four 8 × 8 matrices of 16-bit entries, or 8 × 4 of 32-bit entries (ldmatrix). `row` of lane l is the address
/// of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(std::uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
}
__device__ inline void load_matrices_transposed(std::uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
}

/// Stores two neighbouring entries of a tile. The first one's index is even.
template <typename T>
__device__ void store_pair(T* to, T first, T second) {
    store_pack(to, Pack<T, 2>{{first, second}});
}
template <HalfPrecision T>
__device__ void store_pair(T* to, float first, float second) {
    *reinterpret_cast<std::uint32_t*>(to) = pack_pair<T>(first, second);
}

/// Tensor cores multiply bfloat16 or float16, with sums in float.
template <HalfPrecision T>
struct HalfProduct {
    using Scalar = T;
    using Sum = float;
    static constexpr bool has_tensor_cores = true;
    static constexpr int row_padding = 8;
    /// Entries along the inner dimension: of one instruction, and of a 16-byte row of load_matrices.
    static constexpr int step = 16, matrix_columns = 8;

    __device__ static void round(std::uint32_t (&)[4]) {}  // tiles have 16 bits already
    __device__ static float operand(T value) { return static_cast<float>(value); }

    __device__ static void add_product(float (&acc)[4], const std::uint32_t (&left)[4], std::uint32_t right0,
                                       std::uint32_t right1) {
        if constexpr (std::is_same_v<T, bfloat16>)
            asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                "{%0, %1, %2, %3};"
                : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
        else
            asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                "{%0, %1, %2, %3};"
                : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
    }

    template <int width>
    __device__ static void multiply(float (&acc)[width / 8][4], const float (&weights)[2][4], const T* tile) {
        std::uint32_t left[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) left[i] = pack_pair<T>(weights[i / 2][i % 2 * 2], weights[i / 2][i % 2 * 2 + 1]);
        const int lane = lane_id();
        const T* const row = tile + (lane % 16) * (width + row_padding) + lane / 16 * 8;
#pragma unroll
        for (int j = 0; j < width / 8; j += 2) {
            std::uint32_t right[4];
            load_matrices_transposed(right, row + 8 * j);
            add_product(acc[j], left, right[0], right[1]);
            add_product(acc[j + 1], left, right[2], right[3]);
        }
    }
};

/// Tensor cores multiply floats rounded to 10 bits of mantissa, with sums in float.
struct Tf32Product {
    using Scalar = float;
    using Sum = float;
    static constexpr bool has_tensor_cores = true;
    static constexpr int row_padding = 4;
    static constexpr int step = 8, matrix_columns = 4;

    /// The tensor cores drop the lowest 13 bits: adding half of what they drop rounds to nearest. A NaN is not rounded:
    /// 0x7FFFFFFF, which GPU arithmetic produces, would become −0. It gets a bit that is not dropped: one with all its
    /// bits among the lowest 13 would become infinite.
    __device__ static std::uint32_t round(std::uint32_t bits) {
        const float value = __uint_as_float(bits);
        return value == value ? bits + 0x1000u : bits | 0x400000u;
    }
    __device__ static void round(std::uint32_t (&values)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = round(values[i]);
    }
    __device__ static std::uint32_t round(float value) {
        return round(__float_as_uint(value));
    }
    __device__ static float operand(float value) {
        return __uint_as_float(round(value) & ~0x1FFFu);
    }

    __device__ static void add_product(float (&acc)[4], const std::uint32_t (&left)[4], std::uint32_t right0,
                                       std::uint32_t right1) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
    }

    template <int width>
    __device__ static void multiply(float (&acc)[width / 8][4], const float (&weights)[2][4], const float* tile) {
        // The order of the inner index is arbitrary if both operands have the same: the instruction's entries t and
        // t + 4 are columns 2t and 2t + 1 of the weights, which this lane has.
        const float* const corner = tile + accumulator_column() * (width + row_padding) + accumulator_row();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            std::uint32_t left[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) left[i] = round(weights[half][i % 2 * 2 + i / 2]);
            const float* const rows = corner + 8 * half * (width + row_padding);
#pragma unroll
            for (int j = 0; j < width / 8; ++j)
                add_product(acc[j], left, round(rows[8 * j]), round(rows[8 * j + width + row_padding]));
        }
    }
};

/// 16 rows of a tile as the left operand of tensor-core products.
template <typename Arithmetic, int width, bool resident>
class TensorLeft {
public:
    using Scalar = typename Arithmetic::Scalar;
    static constexpr int steps = width / Arithmetic::step;

    TensorLeft() = default;
    __device__ explicit TensorLeft(const Scalar* tile)
        : row_(tile + lane_id() % 16 * (width + Arithmetic::row_padding) +
               lane_id() / 16 * Arithmetic::matrix_columns) {
        if constexpr (resident) {
#pragma unroll
            for (int i = 0; i < steps; ++i) load(fragments_[i], i);
        }
    }
    __device__ void get(std::uint32_t (&fragment)[4], int step) const {
        if constexpr (resident) {
#pragma unroll
            for (int i = 0; i < 4; ++i) fragment[i] = fragments_[step][i];
        } else {
            load(fragment, step);
        }
    }

private:
    __device__ void load(std::uint32_t (&fragment)[4], int step) const {
        load_matrices(fragment, row_ + step * Arithmetic::step);
        Arithmetic::round(fragment);
    }
    const Scalar* row_;
    std::uint32_t fragments_[resident ? steps : 1][4];
};

template <typename Arithmetic, int width, bool resident>
__device__ void multiply_transposed(float (&acc)[2][4], const TensorLeft<Arithmetic, width, resident>& left,
                                    const typename Arithmetic::Scalar* tile) {
    constexpr int columns = Arithmetic::matrix_columns;
    const int lane = lane_id();
    const auto* const row =
        tile + (lane / 16 * 8 + lane % 8) * (width + Arithmetic::row_padding) + lane / 8 % 2 * columns;
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[0][e] = acc[1][e] = 0;
#pragma unroll
    for (int i = 0; i < width / Arithmetic::step; ++i) {
        std::uint32_t from_left[4], right[4];
        load_matrices(right, row + i * Arithmetic::step);
        Arithmetic::round(right);
        left.get(from_left, i);
        Arithmetic::add_product(acc[0], from_left, right[0], right[1]);
        Arithmetic::add_product(acc[1], from_left, right[2], right[3]);
    }
}

/// Fused multiply-adds in T, for exact floats and for double.
template <typename T>
struct ScalarProduct {
    using Scalar = T;
    using Sum = T;
    static constexpr bool has_tensor_cores = false;
    static constexpr int row_padding = 16 / sizeof(T);

    __device__ static T operand(T value) { return value; }

    template <int width>
    __device__ static void multiply(T (&acc)[width / 8][4], const T (&weights)[2][4], const T* tile) {
        const int first_lane = lane_id() / 4 * 4;
        const T* const corner = tile + accumulator_column();
#pragma unroll
        for (int k = 0; k < 16; ++k) {
            const T upper = __shfl_sync(0xffffffffu, weights[k / 8][k % 2], first_lane + k % 8 / 2);
            const T lower = __shfl_sync(0xffffffffu, weights[k / 8][2 + k % 2], first_lane + k % 8 / 2);
            const T* const row = corner + k * (width + row_padding);
#pragma unroll
            for (int j = 0; j < width / 8; ++j) {
                const auto right = load_pack<2>(row + 8 * j);
                acc[j][0] += upper * right.values[0];
                acc[j][1] += upper * right.values[1];
                acc[j][2] += lower * right.values[0];
                acc[j][3] += lower * right.values[1];
            }
        }
    }
};

/// 16 rows of a tile as the left operand of scalar products. They stay in shared memory.
template <typename T, int width>
class ScalarLeft {
public:
    ScalarLeft() = default;
    __device__ explicit ScalarLeft(const T* tile) : tile_(tile) {}
    __device__ const T* row(int i) const { return tile_ + i * (width + ScalarProduct<T>::row_padding); }

private:
    const T* tile_;
};

template <typename T, int width>
__device__ void multiply_transposed(T (&acc)[2][4], const ScalarLeft<T, width>& left, const T* tile) {
    constexpr int stride = width + ScalarProduct<T>::row_padding, lanes = 16 / sizeof(T);
    const T* const upper_row = left.row(accumulator_row());
    const T* const lower_row = left.row(accumulator_row() + 8);
    const T* const column = tile + accumulator_column() * stride;
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[0][e] = acc[1][e] = 0;
#pragma unroll 4
    for (int k = 0; k < width; k += lanes) {
        const auto upper = load_pack<lanes>(upper_row + k), lower = load_pack<lanes>(lower_row + k);
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const auto right = load_pack<lanes>(column + (8 * j + e) * stride + k);
#pragma unroll
                for (int i = 0; i < lanes; ++i) {
                    acc[j][e] += upper.values[i] * right.values[i];
                    acc[j][2 + e] += lower.values[i] * right.values[i];
                }
            }
    }
}

namespace detail {
template <typename Arithmetic, int width, bool resident>
struct LeftOf {
    using type = TensorLeft<Arithmetic, width, resident>;
};
template <typename T, int width, bool resident>
struct LeftOf<ScalarProduct<T>, width, resident> {
    using type = ScalarLeft<T, width>;
};
}  // namespace detail

template <typename Arithmetic, int width, bool resident>
using Left = typename detail::LeftOf<Arithmetic, width, resident>::type;

}  // namespace colt5::cuda
