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
        if (magnitude < 0x38800000u) {  // below 2⁻¹⁴: subnormal, a multiple of 2⁻²⁴; adding 1/2 rounds to one
            const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
            return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3F000000u));
        }
        const std::uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
        return static_cast<std::uint16_t>(sign | ((rounded - (std::uint32_t{127 - 15} << 23)) >> 13));
#endif
    }
};

/// A floating-point number of 16 bits. A storage type: arithmetic is done in float, and conversions to it round to
/// nearest, ties to even.
template <typename Format>
class SmallFloat {
public:
    SmallFloat() = default;
    template <typename T>
    requires std::is_arithmetic_v<T> COLT5_HOST_DEVICE explicit SmallFloat(T value)
        : bits_(Format::round(static_cast<float>(value))) {}

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
