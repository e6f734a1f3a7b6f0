// SPDX-License-Identifier: MIT
#include <colt5/io/dtype.hpp>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include <doctest/doctest.h>

using namespace colt5;

TEST_CASE("dtype: names and sizes go both ways") {
    for (const auto& row : detail::dtype_table) {
        CHECK(dtype_name(row.dtype) == row.name);
        CHECK(dtype_size(row.dtype) == row.bytes);
        CHECK(parse_dtype(row.name) == row.dtype);
    }
    CHECK(dtype_name(DType::boolean) == "BOOL");
    CHECK(dtype_size(DType::bf16) == 2);
    CHECK(parse_dtype("f32") == std::nullopt);
    CHECK(parse_dtype("") == std::nullopt);
    CHECK(dtype_of<float>() == DType::f32);
    CHECK(dtype_of<long>() == DType::i64);
    CHECK(dtype_of<long long>() == DType::i64);
    CHECK(dtype_of<unsigned char>() == DType::u8);
    CHECK(dtype_of<bool>() == DType::boolean);
}

TEST_CASE("dtype: every bfloat16 is the upper half of a float") {
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
        const float value = bfloat16_to_float(static_cast<std::uint16_t>(bits));
        REQUIRE(std::bit_cast<std::uint32_t>(value) == bits << 16);
    }
    CHECK(bfloat16_to_float(0x3F80) == 1.0f);
    CHECK(bfloat16_to_float(0xC049) == -3.140625f);
    CHECK(bfloat16_to_float(0x0001) == 0x1p-133f);  // the smallest subnormal
    CHECK(bfloat16_to_float(0x7F80) == std::numeric_limits<float>::infinity());
    CHECK(std::isnan(bfloat16_to_float(0x7FC0)));
}

TEST_CASE("dtype: every half has the value of its sign, exponent and mantissa") {
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
        const float value = half_to_float(static_cast<std::uint16_t>(bits));
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
    CHECK(half_to_float(0x3C00) == 1.0f);
    CHECK(half_to_float(0x7BFF) == 65504.0f);
    CHECK(half_to_float(0x0001) == 0x1p-24f);
}
