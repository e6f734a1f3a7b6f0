// SPDX-License-Identifier: MIT
#include <colt5/io/dtype.hpp>

#include <cstdint>
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
    CHECK(parse_dtype("unknown") == std::nullopt);
    CHECK(dtype_name(DType::unknown) == "unknown");
    CHECK(dtype_size(DType::unknown) == 0);
    CHECK_FALSE(dtype_converts_to<float>(DType::unknown));
    CHECK_FALSE(dtype_converts_to<std::uint8_t>(DType::unknown));
    CHECK(dtype_of<float>() == DType::f32);
    CHECK(dtype_of<bfloat16>() == DType::bf16);
    CHECK(dtype_of<float16>() == DType::f16);
    CHECK(dtype_of<long>() == DType::i64);
    CHECK(dtype_of<long long>() == DType::i64);
    CHECK(dtype_of<unsigned char>() == DType::u8);
    CHECK(dtype_of<bool>() == DType::boolean);
}
