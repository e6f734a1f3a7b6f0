// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <colt5/core/scalar.hpp>

/// Pairs of bfloat16 or float16, as the tensor cores take them: 32 bits.
namespace colt5::cuda {

/// Two floats of a pair of 16-bit numbers, the first of which is in the lower bits.
template <HalfPrecision T>
__device__ inline float2 unpack_pair(std::uint32_t pair) {
    if constexpr (std::is_same_v<T, bfloat16>)
        return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
    float2 values;
    asm("{\n.reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\n"
        "cvt.f32.f16 %1, high;\n}\n"
        : "=f"(values.x), "=f"(values.y)
        : "r"(pair));
    return values;
}
/// The inverse: rounds two floats to a pair.
template <HalfPrecision T>
__device__ inline std::uint32_t pack_pair(float low, float high) {
    std::uint32_t pair;
    if constexpr (std::is_same_v<T, bfloat16>)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

}  // namespace colt5::cuda
