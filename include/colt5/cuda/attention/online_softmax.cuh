// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <limits>

#include <colt5/cuda/kernel.cuh>
#include <colt5/cuda/tile_product.cuh>

namespace colt5::cuda {

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

/// Sets all accumulators to 0.
template <int blocks, typename Sum>
__device__ void clear(Sum (&acc)[blocks][4]) {
#pragma unroll
    for (int j = 0; j < blocks; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[j][e] = 0;
}

/// The online softmax of a warp's 16 queries over the keys that it has seen so far. Each thread holds entries of two
/// rows, 8 apart, which `half` tells apart.
template <typename Sum, int width>
struct OnlineSoftmax {
    Sum sum[width / 8][4], total[2], largest[2];  // running numerator, denominator and maximum

    __device__ void reset() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            largest[half] = -std::numeric_limits<Sum>::infinity();
            total[half] = 0;
        }
        clear(sum);
    }

    /// Replaces the products q·k of `groups` groups of 16 keys by their weights, e^(product · scale − maximum), and
    /// adds these to the denominator. Hidden keys have −∞. `to_log2` is scale / ln 2.
    template <int groups>
    __device__ void weigh(Sum (&score)[groups][2][4], Sum to_log2) {
        constexpr Sum infinity = std::numeric_limits<Sum>::infinity();
        Sum top[2] = {largest[0], largest[1]}, shift[2];
#pragma unroll
        for (int c = 0; c < groups; ++c)
            for_each_entry([&](int j, int e, int, int) { top[e / 2] = ::max(top[e / 2], score[c][j][e]); });
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            top[half] = row_reduce(top[half], Greater());
            shift[half] = top[half] == -infinity ? Sum(0) : top[half] * to_log2;
            Sum shrink = fast_exp2(largest[half] * to_log2 - shift[half]);
            // Exactly 1, whatever the product was rounded to: keys that the query does not see change no bit.
            if (top[half] == largest[half]) shrink = 1;
            largest[half] = top[half];
            total[half] *= shrink;
#pragma unroll
            for (int j = 0; j < width / 8; ++j) {
                sum[j][2 * half] *= shrink;
                sum[j][2 * half + 1] *= shrink;
            }
        }
#pragma unroll
        for (int c = 0; c < groups; ++c)
            for_each_entry([&](int j, int e, int, int) {
                score[c][j][e] = fast_exp2(score[c][j][e] * to_log2 - shift[e / 2]);
                total[e / 2] += score[c][j][e];
            });
    }
};

}  // namespace colt5::cuda
