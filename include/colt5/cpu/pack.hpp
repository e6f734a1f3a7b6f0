// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <type_traits>

#include <colt5/core/scalar.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/expr/node.hpp>

/// What the evaluator of expressions computes with: `Lanes` neighbouring entries of a row, as numbers of any type or as
/// a mask. The functors of expr/functions.hpp find these operators and functions by argument-dependent lookup.
namespace colt5::cpu {

/// Numbers: one batch of the smallest type of an expression, several batches of the wider types beside it.
template <typename T, Index Lanes>
struct Pack {
    static constexpr Index parts = Lanes / lanes<T>;
    static_assert(parts * lanes<T> == Lanes);

    Pack() = default;
    template <Number Value>
    explicit Pack(Value value) {
        for (Batch<T>& batch : part) batch = Batch<T>(static_cast<T>(value));
    }

    Batch<T> part[std::size_t{parts}];
};

/// The batch type whose comparisons have `Lanes` lanes.
template <Index Lanes>
using MaskScalar = std::conditional_t<Lanes == lanes<double>, double, float>;

/// Truth values, whatever was compared.
template <Index Lanes>
struct PackMask {
    using Bits = typename Batch<MaskScalar<Lanes>>::batch_bool_type;
    Bits bits;
};

/// Lanes in memory.
template <typename T, Index Lanes>
struct alignas(64) PackBuffer {
    T values[std::size_t{Lanes}];
};

/// The number of entries that a load or store covers, as a type if it is all of them.
template <Index Lanes>
using Full = std::integral_constant<Index, Lanes>;

template <typename T, Index Lanes>
Pack<T, Lanes> load_pack(const T* from, Full<Lanes>) {
    Pack<T, Lanes> pack;
    for (Index i = 0; i < pack.parts; ++i) pack.part[i] = load(from + i * lanes<T>);
    return pack;
}
template <HalfPrecision T, Index Lanes>
Pack<float, Lanes> load_pack(const T* from, Full<Lanes> full) {
    PackBuffer<float, Lanes> buffer;
    for (Index i = 0; i < Lanes; ++i) buffer.values[i] = static_cast<float>(from[i]);
    return load_pack(buffer.values, full);
}
template <Index Lanes>
PackMask<Lanes> load_pack(const bool* from, Full<Lanes>) {
    return {PackMask<Lanes>::Bits::load_unaligned(from)};
}
template <typename T, Index Lanes>
void store_pack(T* to, const Pack<T, Lanes>& pack, Full<Lanes>) {
    for (Index i = 0; i < pack.parts; ++i) store(to + i * lanes<T>, pack.part[i]);
}
template <HalfPrecision T, Index Lanes>
void store_pack(T* to, const Pack<float, Lanes>& pack, Full<Lanes> full) {
    PackBuffer<float, Lanes> buffer;
    store_pack(buffer.values, pack, full);
    for (Index i = 0; i < Lanes; ++i) to[i] = static_cast<T>(buffer.values[i]);
}
template <Index Lanes>
void store_pack(bool* to, const PackMask<Lanes>& mask, Full<Lanes>) {
    mask.bits.store_unaligned(to);
}

/// The first `count` entries; the rest is zero or false.
template <Index Lanes, typename T>
auto load_first(const T* from, Index count) {
    PackBuffer<T, Lanes> buffer{};
    std::copy_n(from, count, buffer.values);
    return load_pack(buffer.values, Full<Lanes>());
}
template <Index Lanes, typename T, typename Values>
void store_first(T* to, const Values& pack, Index count) {
    PackBuffer<T, Lanes> buffer;
    store_pack(buffer.values, pack, Full<Lanes>());
    std::copy_n(buffer.values, count, to);
}

/// Replaces the entries from `count` on by `padding`.
template <typename T, Index Lanes>
Pack<T, Lanes> pad(const Pack<T, Lanes>& pack, Index count, T padding) {
    PackBuffer<T, Lanes> buffer;
    store_pack(buffer.values, pack, Full<Lanes>());
    std::fill(buffer.values + count, buffer.values + Lanes, padding);
    return load_pack(buffer.values, Full<Lanes>());
}

/// All entries into one, by a functor for batches and numbers.
template <typename T, Index Lanes, typename Combine>
T reduce(const Pack<T, Lanes>& pack, const Combine& combine) {
    PackBuffer<T, Lanes> buffer{};  // or g++ 14 warns at -O3 that it may be uninitialized
    store_pack(buffer.values, pack, Full<Lanes>());
    for (Index half = Lanes / 2; half > 0; half /= 2)
        for (Index i = 0; i < half; ++i) buffer.values[i] = combine(buffer.values[i], buffer.values[i + half]);
    return buffer.values[0];
}

namespace detail {

template <typename T, Index Lanes, typename Function, typename... More>
Pack<T, Lanes> each(const Function& function, const Pack<T, Lanes>& first, const More&... more) {
    Pack<T, Lanes> result;
    for (Index i = 0; i < result.parts; ++i) result.part[i] = function(first.part[i], more.part[i]...);
    return result;
}

/// A comparison of packs; its bits move to the mask's lanes if the numbers are of another size.
template <typename T, Index Lanes, typename Comparison>
PackMask<Lanes> compare(const Comparison& comparison, const Pack<T, Lanes>& a, const Pack<T, Lanes>& b) {
    if constexpr (std::is_same_v<T, MaskScalar<Lanes>>) {
        return {comparison(a.part[0], b.part[0])};
    } else {
        PackBuffer<bool, Lanes> buffer;
        for (Index i = 0; i < a.parts; ++i)
            comparison(a.part[i], b.part[i]).store_unaligned(buffer.values + i * lanes<T>);
        return load_pack(buffer.values, Full<Lanes>());
    }
}

}  // namespace detail

template <typename T, Index Lanes>
Pack<T, Lanes> operator+(const Pack<T, Lanes>& a, const Pack<T, Lanes>& b) {
    return detail::each([](const auto& x, const auto& y) { return x + y; }, a, b);
}
template <typename T, Index Lanes>
Pack<T, Lanes> operator-(const Pack<T, Lanes>& a, const Pack<T, Lanes>& b) {
    return detail::each([](const auto& x, const auto& y) { return x - y; }, a, b);
}
template <typename T, Index Lanes>
Pack<T, Lanes> operator*(const Pack<T, Lanes>& a, const Pack<T, Lanes>& b) {
    return detail::each([](const auto& x, const auto& y) { return x * y; }, a, b);
}
template <typename T, Index Lanes>
Pack<T, Lanes> operator/(const Pack<T, Lanes>& a, const Pack<T, Lanes>& b) {
    return detail::each([](const auto& x, const auto& y) { return x / y; }, a, b);
}
template <typename T, Index Lanes>
Pack<T, Lanes> operator-(const Pack<T, Lanes>& a) {
    return detail::each([](const auto& x) { return -x; }, a);
}
template <typename T, Index Lanes>
Pack<T, Lanes> max(const Pack<T, Lanes>& a, const Pack<T, Lanes>& b) {
    return detail::each([](const auto& x, const auto& y) { return cpu::max(x, y); }, a, b);
}
template <typename T, Index Lanes>
Pack<T, Lanes> min(const Pack<T, Lanes>& a, const Pack<T, Lanes>& b) {
    return detail::each([](const auto& x, const auto& y) { return cpu::min(x, y); }, a, b);
}
template <typename T, Index Lanes>
Pack<T, Lanes> pow(const Pack<T, Lanes>& a, const Pack<T, Lanes>& b) {
    return detail::each([](const auto& x, const auto& y) { return cpu::pow(x, y); }, a, b);
}
template <typename T, Index Lanes>
Pack<T, Lanes> sqrt(const Pack<T, Lanes>& a) {
    return detail::each([](const auto& x) { return xsimd::sqrt(x); }, a);
}
template <typename T, Index Lanes>
Pack<T, Lanes> abs(const Pack<T, Lanes>& a) {
    return detail::each([](const auto& x) { return xsimd::abs(x); }, a);
}
template <typename T, Index Lanes>
Pack<T, Lanes> exp(const Pack<T, Lanes>& a) {
    return detail::each([](const auto& x) { return cpu::exp(x); }, a);
}
template <typename T, Index Lanes>
Pack<T, Lanes> log(const Pack<T, Lanes>& a) {
    return detail::each([](const auto& x) { return cpu::log(x); }, a);
}
template <typename T, Index Lanes>
Pack<T, Lanes> erf(const Pack<T, Lanes>& a) {
    return detail::each([](const auto& x) { return cpu::erf(x); }, a);
}
template <typename T, Index Lanes>
Pack<T, Lanes> gelu(const Pack<T, Lanes>& a) {
    return detail::each([](const auto& x) { return cpu::gelu(x); }, a);
}
template <typename T, Index Lanes>
Pack<T, Lanes> gelu_slope(const Pack<T, Lanes>& a) {
    return detail::each([](const auto& x) { return cpu::gelu_slope(x); }, a);
}
template <typename T, Index Lanes>
Pack<T, Lanes> tanh(const Pack<T, Lanes>& a) {
    return detail::each([](const auto& x) { return cpu::tanh(x); }, a);
}

template <typename T, Index Lanes>
PackMask<Lanes> operator<(const Pack<T, Lanes>& a, const Pack<T, Lanes>& b) {
    return detail::compare([](const auto& x, const auto& y) { return x < y; }, a, b);
}
template <typename T, Index Lanes>
PackMask<Lanes> operator<=(const Pack<T, Lanes>& a, const Pack<T, Lanes>& b) {
    return detail::compare([](const auto& x, const auto& y) { return x <= y; }, a, b);
}
template <typename T, Index Lanes>
PackMask<Lanes> operator==(const Pack<T, Lanes>& a, const Pack<T, Lanes>& b) {
    return detail::compare([](const auto& x, const auto& y) { return x == y; }, a, b);
}
template <typename T, Index Lanes>
PackMask<Lanes> operator!=(const Pack<T, Lanes>& a, const Pack<T, Lanes>& b) {
    return !(a == b);  // xsimd's own != is false for NaN with some instruction sets
}
template <Index Lanes>
PackMask<Lanes> operator&&(const PackMask<Lanes>& a, const PackMask<Lanes>& b) {
    return {a.bits & b.bits};
}
template <Index Lanes>
PackMask<Lanes> operator||(const PackMask<Lanes>& a, const PackMask<Lanes>& b) {
    return {a.bits | b.bits};
}
template <Index Lanes>
PackMask<Lanes> operator!(const PackMask<Lanes>& a) {
    return {!a.bits};
}

template <typename T, Index Lanes>
Pack<T, Lanes> select(const PackMask<Lanes>& mask, const Pack<T, Lanes>& a, const Pack<T, Lanes>& b) {
    if constexpr (std::is_same_v<T, MaskScalar<Lanes>>) {
        return detail::each([&](const auto& x, const auto& y) { return xsimd::select(mask.bits, x, y); }, a, b);
    } else {
        PackBuffer<bool, Lanes> buffer;
        store_pack(buffer.values, mask, Full<Lanes>());
        Pack<T, Lanes> result;
        for (Index i = 0; i < result.parts; ++i) {
            const auto bits = Batch<T>::batch_bool_type::load_unaligned(buffer.values + i * lanes<T>);
            result.part[i] = xsimd::select(bits, a.part[i], b.part[i]);
        }
        return result;
    }
}
template <Index Lanes>
PackMask<Lanes> select(const PackMask<Lanes>& mask, const PackMask<Lanes>& a, const PackMask<Lanes>& b) {
    return {(mask.bits & a.bits) | ((!mask.bits) & b.bits)};
}

template <typename To, typename T, Index Lanes>
Pack<To, Lanes> convert(const Pack<T, Lanes>& a) {
    if constexpr (std::is_same_v<To, T>) {
        return a;
    } else {
        PackBuffer<T, Lanes> from;
        PackBuffer<To, Lanes> to;
        store_pack(from.values, a, Full<Lanes>());
        for (Index i = 0; i < Lanes; ++i) to.values[i] = static_cast<To>(from.values[i]);
        return load_pack(to.values, Full<Lanes>());
    }
}

}  // namespace colt5::cpu
