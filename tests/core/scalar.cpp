// SPDX-License-Identifier: MIT
#include <colt5/core/scalar.hpp>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include <doctest/doctest.h>

using namespace colt5;

namespace {

template <typename T>
float widened(std::uint32_t bits) {
    return static_cast<float>(T::from_bits(static_cast<std::uint16_t>(bits)));
}

/// Rounding against its definition: of the neighbours below and above, the nearer one, or the even one.
template <typename T>
void check_rounding(std::uint32_t infinity) {
    for (std::uint32_t bits = 0; bits + 1 < infinity; ++bits) {
        const double below = widened<T>(bits), above = widened<T>(bits + 1), middle = (below + above) / 2;
        const std::uint32_t even = bits % 2 == 0 ? bits : bits + 1;
        const auto round = [](auto value) { return T(value).bits(); };
        REQUIRE(round(below) == bits);
        REQUIRE(round(-below) == (bits | 0x8000u));
        REQUIRE(round(middle) == even);
        REQUIRE(round(std::nextafter(middle, 0.0)) == bits);  // not twice: the nearest float is the middle
        REQUIRE(round(std::nextafter(middle, 1e300)) == bits + 1);
        REQUIRE(round(-std::nextafter(middle, 1e300)) == ((bits + 1) | 0x8000u));
        if (static_cast<double>(static_cast<float>(middle)) != middle) continue;  // the smallest bfloat16s
        REQUIRE(round(static_cast<float>(middle)) == even);
        REQUIRE(round(std::nextafter(static_cast<float>(middle), 0.0f)) == bits);
        REQUIRE(round(std::nextafter(static_cast<float>(middle), std::numeric_limits<float>::infinity())) == bits + 1);
    }
    const float largest = widened<T>(infinity - 1);
    CHECK(T(largest).bits() == infinity - 1);
    CHECK(T(std::numeric_limits<float>::infinity()).bits() == infinity);
    CHECK(T(-std::numeric_limits<float>::infinity()).bits() == (infinity | 0x8000u));
    CHECK(T(std::numeric_limits<float>::max()).bits() == infinity);
    CHECK(T(1e300).bits() == infinity);
    CHECK(T(-1e-300).bits() == 0x8000u);
    CHECK(std::isnan(static_cast<float>(T(std::numeric_limits<double>::quiet_NaN()))));
    CHECK(T(std::int64_t{1} << 40).bits() == T(0x1p40f).bits());
    CHECK(std::isnan(static_cast<float>(T(std::numeric_limits<float>::quiet_NaN()))));
    CHECK(std::isnan(static_cast<float>(T(std::bit_cast<float>(0xFF800001u)))));  // all of its bits are low ones
}

}  // namespace

TEST_CASE("scalar: every bfloat16 is the upper half of a float") {
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits)
        REQUIRE(std::bit_cast<std::uint32_t>(widened<bfloat16>(bits)) == bits << 16);
    CHECK(widened<bfloat16>(0xC049) == -3.140625f);
    CHECK(widened<bfloat16>(0x0001) == 0x1p-133f);  // the smallest subnormal
}

TEST_CASE("scalar: every float16 has the value of its sign, exponent and mantissa") {
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
        const float value = widened<float16>(bits);
        const int exponent = static_cast<int>((bits >> 10) & 31), mantissa = static_cast<int>(bits & 1023);
        REQUIRE(std::signbit(value) == (bits >= 0x8000));
        if (exponent == 31 && mantissa != 0) {
            REQUIRE(std::isnan(value));
            REQUIRE((std::bit_cast<std::uint32_t>(value) & 0x7FFFFF) == static_cast<std::uint32_t>(mantissa) << 13);
        } else if (exponent == 31) {
            REQUIRE(std::isinf(value));
        } else {
            const double expected =
                exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
            REQUIRE(std::fabs(static_cast<double>(value)) == expected);
        }
    }
    CHECK(widened<float16>(0x7BFF) == 65504.0f);
}

TEST_CASE("scalar: conversion rounds to nearest, ties to even") {
    check_rounding<bfloat16>(0x7F80);
    check_rounding<float16>(0x7C00);
}
