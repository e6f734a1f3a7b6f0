// SPDX-License-Identifier: MIT
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>
#include <type_traits>

#include <colt5/core/macros.hpp>

namespace colt5 {

/// The upper half of a float: 8 bits of exponent, 7 of mantissa. A storage type: arithmetic is done in float, and
/// conversions to it round to nearest, ties to even.
class bfloat16 {
public:
    bfloat16() = default;
    template <typename T>
    requires std::is_arithmetic_v<T> COLT5_HOST_DEVICE explicit bfloat16(T value)
        : bits_(round(static_cast<float>(value))) {}

    template <typename T>
    requires std::is_arithmetic_v<T> COLT5_HOST_DEVICE explicit operator T() const {
        return static_cast<T>(std::bit_cast<float>(static_cast<std::uint32_t>(bits_) << 16));
    }

    COLT5_HOST_DEVICE std::uint16_t bits() const { return bits_; }
    COLT5_HOST_DEVICE static bfloat16 from_bits(std::uint16_t bits) {
        bfloat16 value;
        value.bits_ = bits;
        return value;
    }

private:
    COLT5_HOST_DEVICE static std::uint16_t round(float value) {
#if defined(__CUDA_ARCH__)
        std::uint16_t rounded;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
        return rounded;
#else
        const auto bits = std::bit_cast<std::uint32_t>(value);
        if ((bits & 0x7FFFFFFFu) > 0x7F800000u)
            return static_cast<std::uint16_t>((bits >> 16) | 0x40u);  // NaN stays NaN
        return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
#endif
    }

    std::uint16_t bits_;
};

namespace detail {
template <typename Scalar>
struct Accumulate {
    using type = float;
};
template <>
struct Accumulate<double> {
    using type = double;
};
}  // namespace detail

/// The type that sums, softmax, norms and routing are computed in: double for double, float for everything else.
template <typename Scalar>
using accumulate_t = typename detail::Accumulate<Scalar>::type;

}  // namespace colt5
