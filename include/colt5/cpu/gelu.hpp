// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <numbers>
#include <type_traits>

#include <colt5/cpu/simd.hpp>

namespace colt5::cpu {

/// The normal distribution function Φ far below 0 is  Φ(−a) = exp(−a² / 2) · m(a)  with a smooth m, while 1 + erf
/// cancels there. With r = 1 / (a + c), u = 1 − 2 c r: m(a) = r · Σ coefficient[i] uⁱ, which interpolates
/// exp(a² / 2) erfc(a / √2) / (2 r) at the Chebyshev nodes of a = 0 … limit, with an error of 2⁻²⁹ and 2⁻⁵⁶ of m.
template <typename T>
struct NormalTail {
    static constexpr bool single = std::is_same_v<T, float>;
    /// exp(−a² / 2) is 0 from here on.
    static constexpr T limit = single ? T(14.5) : T(38.75);
    static constexpr T center = single ? T(3) : T(5);
    static constexpr auto coefficients = [] {
        if constexpr (single)
            return std::array{0.7290836907f,     -0.5093319895f,   0.2300176777f,   -0.04726274528f,
                              -0.01046229376f,   0.006969813131f,  0.001024135711f, -0.001034222059f,
                              -0.0002445826664f, 0.0001331259088f, 5.53559663e-5f};
        else
            return std::array{
                0.7691930497500629587,    -0.6653825028900567022,   0.4953056159699763705,    -0.3135331566713043699,
                0.1650203661703871012,    -0.06911863870631463499,  0.02079506679983145099,   -0.002993376770464513983,
                -0.000797869397895405891, 0.0005448990646386962026, -5.937573161377785314e-5, -4.976281494884926768e-5,
                1.668122745983678582e-5,  3.980909182534223993e-6,  -2.769298691373465716e-6, -3.366404491873436032e-7,
                4.331826917116089211e-7,  4.232103191151187232e-8,  -6.596767667210022529e-8, -9.356999503385361222e-9,
                7.66264616322336736e-9,   1.769756540322479093e-9,  -1.531064473669402348e-10};
    }();

    explicit NormalTail(const Batch<T>& x)
        : inside(xsimd::min(Batch<T>(limit), xsimd::max(Batch<T>(-limit), x))),  // in this order a NaN stays one
          distance(xsimd::abs(inside)) {
        // The rounding of a² would move exp(−a² / 2) by up to a² / 4 ULP: it is found by halving the digits of a.
        const Batch<T> split = distance * Batch<T>(single ? T(0x1001) : T(0x8000001));
        const Batch<T> high = split - (split - distance), low = distance - high;
        const Batch<T> square = distance * distance, minus_half(T(-0.5));
        const Batch<T> rest = (high * high - square) + low * (high + distance);
        const Batch<T> rounded = cpu::exp(square * minus_half);
        bell = xsimd::fma(rounded, rest * minus_half, rounded);
        const Batch<T> r = Batch<T>(T(1)) / (distance + Batch<T>(center));
        const Batch<T> u = xsimd::fma(Batch<T>(-2 * center), r, Batch<T>(T(1)));
        Batch<T> sum(coefficients.back());
        unroll<static_cast<int>(coefficients.size()) - 1>(
            [&](auto i) { sum = xsimd::fma(sum, u, Batch<T>(coefficients[coefficients.size() - 2 - i])); });
        ratio = r * sum;
    }

    Batch<T> inside;    ///< x within ±limit
    Batch<T> distance;  ///< its magnitude, a
    Batch<T> bell;      ///< exp(−a² / 2)
    Batch<T> ratio;     ///< m(a)
};

/// x · Φ(x), the tail being that of x. Within 7 ULP in float and 10 in double where it is normal; −0 at −∞,
/// +∞ at +∞.
template <typename T>
Batch<T> gelu(const NormalTail<T>& tail, const Batch<T>& x) {
    const Batch<T> below = tail.bell * (tail.ratio * tail.inside);
    return xsimd::select(x > Batch<T>(T(0)), x - below, below);
}

/// The derivative Φ(x) + x φ(x), φ(x) = exp(−x² / 2) / √(2π). Within 3 ULP of 1 everywhere, and within 8 of its own
/// for x < −1 where φ(x) is normal; 0 at −∞, 1 at +∞.
template <typename T>
Batch<T> gelu_slope(const NormalTail<T>& tail) {
    constexpr auto density = static_cast<T>(std::numbers::inv_sqrtpi / std::numbers::sqrt2);
    const Batch<T> below = tail.bell * xsimd::fma(Batch<T>(-density), tail.distance, tail.ratio);
    return xsimd::select(tail.inside > Batch<T>(T(0)), Batch<T>(T(1)) - below, below);
}

template <typename T>
Batch<T> gelu(const Batch<T>& x) {
    return gelu(NormalTail<T>(x), x);
}
template <typename T>
Batch<T> gelu_slope(const Batch<T>& x) {
    return gelu_slope(NormalTail<T>(x));
}

}  // namespace colt5::cpu
