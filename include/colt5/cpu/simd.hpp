// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <numbers>
#include <type_traits>
#include <utility>

#include <colt5/core/macros.hpp>

// Without optimization, GCC's intrinsics of AVX-512 are macros whose casts do not take the batches that xsimd 8.1 hands
// over. As functions they do.
#if defined(__AVX512BW__) && !defined(__OPTIMIZE__) && !defined(__clang__)
#define COLT5_BLEND_FUNCTIONS
#include <immintrin.h>
namespace colt5::cpu::detail {
inline __m512i blend_epi8(__mmask64 mask, __m512i a, __m512i b) {
    return _mm512_mask_blend_epi8(mask, a, b);
}
inline __m512i blend_epi16(__mmask32 mask, __m512i a, __m512i b) {
    return _mm512_mask_blend_epi16(mask, a, b);
}
}  // namespace colt5::cpu::detail
#pragma push_macro("_mm512_mask_blend_epi8")
#pragma push_macro("_mm512_mask_blend_epi16")
#undef _mm512_mask_blend_epi8
#undef _mm512_mask_blend_epi16
#define _mm512_mask_blend_epi8 colt5::cpu::detail::blend_epi8
#define _mm512_mask_blend_epi16 colt5::cpu::detail::blend_epi16
#endif

// <complex.h> defines I, which xsimd uses as a name.
#pragma push_macro("I")
#undef I
#include <xsimd/xsimd.hpp>
#pragma pop_macro("I")

#if defined(COLT5_BLEND_FUNCTIONS)
#undef COLT5_BLEND_FUNCTIONS
#pragma pop_macro("_mm512_mask_blend_epi8")
#pragma pop_macro("_mm512_mask_blend_epi16")
#endif

#include <colt5/core/view.hpp>

/// A thin layer over xsimd, for kernels. Call these functions qualified (`cpu::exp(x)`): xsimd has some of the same
/// names.
namespace colt5::cpu {

/// The widest vector register of the instruction set that the program is compiled for.
template <typename T>
using Batch = xsimd::batch<T>;

/// Number of elements of a batch.
template <typename T>
inline constexpr Index lanes = static_cast<Index>(Batch<T>::size);

/// Calls body(i) for i = 0 … count − 1, each a constant: arrays of batches that are indexed by it stay in registers.
template <int count, typename Body>
void unroll(Body&& body) {
    [&]<int... i>(std::integer_sequence<int, i...>) {
        (body(std::integral_constant<int, i>()), ...);
    }
    (std::make_integer_sequence<int, count>());
}

/// Calls body(i, j) for i = 0 … rows − 1 and j = 0 … columns − 1, row by row, both constants.
template <int rows, int columns, typename Body>
void unroll(Body&& body) {
    [&]<int... n>(std::integer_sequence<int, n...>) {
        (body(std::integral_constant<int, n / columns>(), std::integral_constant<int, n % columns>()), ...);
    }
    (std::make_integer_sequence<int, rows * columns>());
}

namespace detail {
/// A batch in memory.
template <typename T>
struct alignas(sizeof(T) * Batch<T>::size) Lanes {
    T values[Batch<T>::size];
};
}  // namespace detail

template <typename T>
Batch<T> load(const T* from) {
    return Batch<T>::load_unaligned(from);
}

template <typename T>
void store(T* to, const Batch<T>& batch) {
    batch.store_unaligned(to);
}

/// The first `count` lanes from memory, zeros in the others. Reads nothing beyond from + count.
template <typename T>
Batch<T> load_partial(const T* from, Index count) {
    detail::Lanes<T> lane{};
    std::copy_n(from, count, lane.values);
    return Batch<T>::load_aligned(lane.values);
}

/// Writes the first `count` lanes, and nothing beyond to + count.
template <typename T>
void store_partial(T* to, const Batch<T>& batch, Index count) {
    detail::Lanes<T> lane;
    batch.store_aligned(lane.values);
    std::copy_n(lane.values, count, to);
}

/// Replaces the lanes from `count` on by `padding`.
template <typename T>
Batch<T> pad(const Batch<T>& batch, Index count, T padding) {
    detail::Lanes<T> lane;
    batch.store_aligned(lane.values);
    std::fill(lane.values + count, lane.values + lanes<T>, padding);
    return Batch<T>::load_aligned(lane.values);
}

/// Combines all lanes, halving: lane i with lane i + size/2, and so on.
template <typename T, typename Combine>
T reduce(const Batch<T>& batch, Combine combine) {
    detail::Lanes<T> lane{};  // or g++ 14 warns at -O3 that it may be uninitialized
    batch.store_aligned(lane.values);
    for (std::size_t half = Batch<T>::size / 2; half > 0; half /= 2)
        for (std::size_t i = 0; i < half; ++i) lane.values[i] = combine(lane.values[i], lane.values[i + half]);
    return lane.values[0];
}
template <typename T>
T reduce_add(const Batch<T>& batch) {
    return reduce(batch, [](T a, T b) { return a + b; });
}
template <typename T>
T reduce_max(const Batch<T>& batch) {
    return reduce(batch, [](T a, T b) { return a > b ? a : b; });
}
template <typename T>
T reduce_min(const Batch<T>& batch) {
    return reduce(batch, [](T a, T b) { return a < b ? a : b; });
}

/// Calls body(offset, count) for [0, n) in steps of a batch; `count` is `lanes<T>` in all calls but perhaps the last.
/// With load(…, count) and store(…, count) the tail runs the same arithmetic as the body.
template <typename T, typename Body>
void for_each_batch(Index n, Body&& body) {
    Index offset = 0;
    for (; offset + lanes<T> <= n; offset += lanes<T>) body(offset, lanes<T>);
    if (offset < n) body(offset, n - offset);
}

/// load or load_partial, whichever `count` asks for.
template <typename T>
Batch<T> load(const T* from, Index count) {
    return count == lanes<T> ? load(from) : load_partial(from, count);
}
template <typename T>
void store(T* to, const Batch<T>& batch, Index count) {
    if (count == lanes<T>)
        store(to, batch);
    else
        store_partial(to, batch, count);
}

/// Σ a[i] b[i]
template <typename T>
T dot(const T* a, const T* b, Index count) {
    Batch<T> total(T(0));
    for_each_batch<T>(count,
                      [&](Index j, Index width) { total = xsimd::fma(load(a + j, width), load(b + j, width), total); });
    return reduce_add(total);
}

namespace detail {
/// A batch as a vector of the compiler, whose lanes it can shuffle.
template <typename T>
struct VectorOf {
    typedef T type __attribute__((vector_size(sizeof(T) * Batch<T>::size)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

/// Lane i of the result is lane choose(i) of a, or lane choose(i) − size of b.
template <typename T, typename Choose>
Vector<T> shuffle(Vector<T> a, Vector<T> b, Choose) {
    return [&]<int... i>(std::integer_sequence<int, i...>) {
        return __builtin_shufflevector(a, b, Choose()(i)...);
    }
    (std::make_integer_sequence<int, static_cast<int>(Batch<T>::size)>());
}

/// Transposes a square of `size` rows, one a vector: first in each 16 bytes, then squares of those among each other.
template <typename T, int size = static_cast<int>(Batch<T>::size)>
[[gnu::always_inline]] inline void transpose_square(Vector<T>* row) {
    constexpr int part = std::min(size, static_cast<int>(16 / sizeof(T)));
    // Entries of two rows take turns, those of the lower or of the upper half of each part.
    constexpr auto lower = [](int i) { return i / part * part + i % part / 2 + i % 2 * size; };
    constexpr auto upper = [](int i) { return i / part * part + i % part / 2 + i % 2 * size + part / 2; };
    unroll<size / part>([&](auto block) {
        constexpr int first = block * part;
        for (int step = 1; step < part; step *= 2) {
            Vector<T> next[std::size_t{part}];
            unroll<part / 2>([&](auto r) {
                next[2 * r] = shuffle<T>(row[first + r], row[first + r + part / 2], lower);
                next[2 * r + 1] = shuffle<T>(row[first + r], row[first + r + part / 2], upper);
            });
            unroll<part>([&](auto r) { row[first + r] = next[r]; });
        }
    });
    const auto exchange =
        [&](auto distance) {  // the upper half of 2 · distance entries of one row for the lower of another
            constexpr int d = distance;
            constexpr auto lower_halves = [](int i) { return i / d % 2 == 0 ? i : size + i - d; };
            constexpr auto upper_halves = [](int i) { return i / d % 2 == 0 ? i + d : size + i; };
            unroll<size>([&](auto r) {
                if constexpr (r / d % 2 == 0) {
                    const Vector<T> a = row[r], b = row[r + d];
                    row[r] = shuffle<T>(a, b, lower_halves);
                    row[r + d] = shuffle<T>(a, b, upper_halves);
                }
            });
        };
    if constexpr (size > part) exchange(std::integral_constant<int, part>());
    if constexpr (size > 2 * part) exchange(std::integral_constant<int, 2 * part>());
    static_assert(size <= 4 * part);
}
}  // namespace detail

/// to (columns, rows) = fromᵀ, where the numbers of rows and columns are divisible by lanes<T>.
template <typename T>
void transpose(Index rows, Index columns, const T* from, Index stride, T* to, Index to_stride) {
    constexpr auto size = static_cast<int>(lanes<T>);
    constexpr Index line = std::max(lanes<T>, Index{64 / sizeof(T)});  // what one row has in a line of the cache
    // A line of every row at a time, and the next but one asked for: rows may be far apart and share a set of the
    // cache.
    for (Index first = 0; first < columns; first += line)
        for (Index i = 0; i < rows; i += size)
            for (Index j = first; j < std::min(columns, first + line); j += size) {
                detail::Vector<T> block[std::size_t{size}];
                const Index ahead = j + 2 * line < columns ? 2 * line : 0;
                unroll<size>([&](auto r) {
                    const T* const row = from + (i + r) * stride + j;
                    __builtin_prefetch(row + ahead);
                    std::memcpy(&block[r], row, sizeof(block[r]));
                });
                detail::transpose_square<T>(block);
                unroll<size>([&](auto c) { std::memcpy(to + (j + c) * to_stride + i, &block[c], sizeof(block[c])); });
            }
}

/// NaN in some lane where an entry is not finite, zeros elsewhere, added to `found`: many rows need one look at it.
template <typename T>
Batch<T> look_for_nonfinite(const Batch<T>& x, const Batch<T>& found) {
    return xsimd::fma(x, Batch<T>(T(0)), found);
}
template <typename T>
bool found_nonfinite(const Batch<T>& found) {
    return !(reduce_add(found) == T(0));
}
template <typename T>
bool all_finite(const T* row, Index count) {
    Batch<T> found(T(0));
    for_each_batch<T>(count, [&](Index j, Index width) { found = look_for_nonfinite(load(row + j, width), found); });
    return !found_nonfinite(found);
}

/// to += factor · row
template <typename T>
void add_row(T* to, const T* row, Index count, T factor = T(1)) {
    for_each_batch<T>(count, [&](Index j, Index width) {
        store(to + j, xsimd::fma(Batch<T>(factor), load(row + j, width), load(to + j, width)), width);
    });
}
/// row = row ∘ factors
template <typename T>
void multiply_row(T* row, const T* factors, Index count) {
    for_each_batch<T>(
        count, [&](Index j, Index width) { store(row + j, load(row + j, width) * load(factors + j, width), width); });
}
template <typename T>
void scale_row(T* row, Index count, T factor) {
    for_each_batch<T>(count,
                      [&](Index j, Index width) { store(row + j, load(row + j, width) * Batch<T>(factor), width); });
}

// Functions. The stated errors were measured against twice the precision with SSE2, AVX2, AVX-512 and NEON, and are
// tested; a NaN gives a NaN. For 1/√x divide: xsimd's rsqrt is an estimate of 12 bits.

/// eˣ. Within 1.5 ULP (both types) where x and the result are normal. Exactly 0 for x = −∞ and whatever is too small;
/// subnormal results may be 0. +∞ from 88.37 (double: 709.43) on, a little before the result overflows.
template <typename T>
Batch<T> exp(const Batch<T>& x) {
    return xsimd::exp(x);
}
/// ln x. Within 1 ULP for x > 0 that is normal or +∞; −∞ for 0, NaN below.
template <typename T>
Batch<T> log(const Batch<T>& x) {
    return xsimd::log(x);
}
/// The error function. Within 2.5 ULP in float, 70 ULP (1.5e-14) in double; ±1 for ±∞.
template <typename T>
Batch<T> erf(const Batch<T>& x) {
    return xsimd::erf(x);
}
/// Within 1.5 ULP, with NEON 1.7; ±1 for ±∞.
template <typename T>
Batch<T> tanh(const Batch<T>& x) {
    return xsimd::tanh(x);
}
/// x to the power of y, for x >= 0. Within 4 + 2 · |y · ln x| ULP where the result is normal.
template <typename T>
Batch<T> pow(const Batch<T>& x, const Batch<T>& y) {
    return xsimd::pow(x, y);
}
/// sin x and cos x. Within 1 ULP of 1 for |x| <= 3.15.
template <typename T>
std::pair<Batch<T>, Batch<T>> sincos(const Batch<T>& x) {
    return xsimd::sincos(x);
}

/// The larger and the smaller of a and b; b where one of them is NaN. Which operand xsimd's own give then depends on
/// its version.
template <typename T>
Batch<T> max(const Batch<T>& a, const Batch<T>& b) {
    return xsimd::select(a > b, a, b);
}
template <typename T>
Batch<T> min(const Batch<T>& a, const Batch<T>& b) {
    return xsimd::select(a < b, a, b);
}

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
        : inside(xsimd::min(xsimd::max(x, Batch<T>(-limit)), Batch<T>(limit))), distance(xsimd::abs(inside)) {
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

    Batch<T> inside;    ///< x within ±limit; anything for a NaN
    Batch<T> distance;  ///< its magnitude, a
    Batch<T> bell;      ///< exp(−a² / 2)
    Batch<T> ratio;     ///< m(a)
};

/// x · Φ(x), the tail being that of x. Within 7 ULP in float and 10 in double where it is normal; −0 at −∞,
/// +∞ at +∞.
template <typename T>
Batch<T> gelu(const NormalTail<T>& tail, const Batch<T>& x) {
    const Batch<T> below = tail.bell * (tail.ratio * tail.inside);
    return xsimd::select(x <= Batch<T>(T(0)), below, x - below);
}

/// The derivative Φ(x) + x φ(x), φ(x) = exp(−x² / 2) / √(2π). Within 3 ULP of 1 everywhere, and within 8 of its own
/// for x < −1 where φ(x) is normal; 0 at −∞, 1 at +∞.
template <typename T>
Batch<T> gelu_slope(const NormalTail<T>& tail, const Batch<T>& x) {
    constexpr auto density = static_cast<T>(std::numbers::inv_sqrtpi / std::numbers::sqrt2);
    const Batch<T> below = tail.bell * xsimd::fma(Batch<T>(-density), tail.distance, tail.ratio);
    return xsimd::select(x == x, xsimd::select(x <= Batch<T>(T(0)), below, Batch<T>(T(1)) - below), x);
}

template <typename T>
Batch<T> gelu(const Batch<T>& x) {
    return gelu(NormalTail<T>(x), x);
}
template <typename T>
Batch<T> gelu_slope(const Batch<T>& x) {
    return gelu_slope(NormalTail<T>(x), x);
}

}  // namespace colt5::cpu
