// SPDX-License-Identifier: MIT
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>
#include <type_traits>

#include <colt5/core/macros.hpp>

namespace colt5 {

namespace detail {

/// 8 bits of exponent, 7 of mantissa: the upper half of a float.
struct Bfloat16Format {
    COLT5_HOST_DEVICE static float widen(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }
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
};

/// IEEE binary16: 5 bits of exponent, 10 of mantissa.
struct Float16Format {
    COLT5_HOST_DEVICE static float widen(std::uint16_t bits) {
#if defined(__CUDA_ARCH__)
        float wide;
        asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
        return wide;
#else
        const std::uint32_t sign = (bits & 0x8000u) << 16;
        const std::uint32_t exponent = (bits >> 10) & 0x1Fu;
        const std::uint32_t mantissa = bits & 0x3FFu;
        if (exponent == 0) {  // zero or subnormal: mantissa · 2⁻²⁴, a normal float
            const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
            return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
        }
        const std::uint32_t wide_exponent = exponent == 0x1Fu ? 0xFFu : exponent + (127 - 15);
        return std::bit_cast<float>(sign | (wide_exponent << 23) | (mantissa << 13));
#endif
    }
    COLT5_HOST_DEVICE static std::uint16_t round(float value) {
#if defined(__CUDA_ARCH__)
        std::uint16_t rounded;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
        return rounded;
#else
        const auto bits = std::bit_cast<std::uint32_t>(value);
        const std::uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
        if (magnitude > 0x7F800000u) return static_cast<std::uint16_t>(sign | 0x7E00u);  // NaN
        if (magnitude >= 0x477FF000u) return static_cast<std::uint16_t>(sign | 0x7C00u);  // rounds to 2¹⁶ or more: ∞
        // Below 2⁻¹⁴ the result is subnormal, a multiple of 2⁻²⁴. Adding 1/2 rounds to such a multiple, because floats
        // in [1/2, 1) are 2⁻²⁴ apart.
        if (magnitude < 0x38800000u) {
            const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
            return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3F000000u));
        }
        const std::uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
        return static_cast<std::uint16_t>(sign | ((rounded - (std::uint32_t{127 - 15} << 23)) >> 13));
#endif
    }
};

/// A float for a number that is rounded further: if it is no float, the odd one of its two neighbours. A float that
/// lies halfway between two numbers of fewer bits is even, so that the second rounding sees on which side the number
/// was.
template <typename T>
COLT5_HOST_DEVICE float round_to_odd(T value) {
    const auto nearest = static_cast<float>(value);
    if constexpr (std::is_same_v<T, float> || sizeof(T) <= 2) {
        return nearest;
    } else {
        const auto exact = static_cast<double>(value), rounded = static_cast<double>(nearest);
        if (rounded == exact || exact != exact) return nearest;
        const bool is_beyond = exact < 0 ? rounded < exact : rounded > exact;
        return std::bit_cast<float>((std::bit_cast<std::uint32_t>(nearest) - (is_beyond ? 1u : 0u)) | 1u);
    }
}

/// A floating-point number of 16 bits. A storage type: arithmetic is done in float, and conversions to it round to
/// nearest, ties to even, once.
template <typename Format>
class SmallFloat {
public:
    SmallFloat() = default;
    template <typename T>
    requires std::is_arithmetic_v<T> COLT5_HOST_DEVICE explicit SmallFloat(T value)
        : bits_(Format::round(round_to_odd(value))) {}

    template <typename T>
    requires std::is_arithmetic_v<T> COLT5_HOST_DEVICE explicit operator T() const {
        return static_cast<T>(Format::widen(bits_));
    }

    COLT5_HOST_DEVICE std::uint16_t bits() const { return bits_; }
    COLT5_HOST_DEVICE static SmallFloat from_bits(std::uint16_t bits) {
        SmallFloat value;
        value.bits_ = bits;
        return value;
    }

private:
    std::uint16_t bits_;
};

}  // namespace detail

/// The upper half of a float: its range, 8 bits of precision.
using bfloat16 = detail::SmallFloat<detail::Bfloat16Format>;
/// IEEE binary16 (torch.float16, half): 11 bits of precision, up to 65504, down to 6e-8.
using float16 = detail::SmallFloat<detail::Float16Format>;

/// The storage types of 16 bits.
template <typename T>
concept HalfPrecision = std::same_as<T, bfloat16> || std::same_as<T, float16>;

/// The type that sums, softmax, norms and routing are computed in, and that gradients of parameters are kept in: double
/// for double, float for everything else.
template <typename Scalar>
using accumulate_t = std::conditional_t<std::same_as<Scalar, double>, double, float>;

}  // namespace colt5
