// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include <colt5/core/scalar.hpp>

namespace colt5 {

/// Element types of tensors in files; `unknown` is any that a file may name and this library does not know.
enum class DType { f64, f32, f16, bf16, f8_e4m3, f8_e5m2, i64, i32, i16, i8, u64, u32, u16, u8, boolean, unknown };

namespace detail {

struct DTypeRow {
    DType dtype;
    std::string_view name;
    std::size_t bytes;
};

/// In the order of the enumerators, without `unknown`.
inline constexpr std::array<DTypeRow, 15> dtype_table{{{DType::f64, "F64", 8},
                                                       {DType::f32, "F32", 4},
                                                       {DType::f16, "F16", 2},
                                                       {DType::bf16, "BF16", 2},
                                                       {DType::f8_e4m3, "F8_E4M3", 1},
                                                       {DType::f8_e5m2, "F8_E5M2", 1},
                                                       {DType::i64, "I64", 8},
                                                       {DType::i32, "I32", 4},
                                                       {DType::i16, "I16", 2},
                                                       {DType::i8, "I8", 1},
                                                       {DType::u64, "U64", 8},
                                                       {DType::u32, "U32", 4},
                                                       {DType::u16, "U16", 2},
                                                       {DType::u8, "U8", 1},
                                                       {DType::boolean, "BOOL", 1}}};

}  // namespace detail

/// As safetensors spells it: "F32", "BF16", "BOOL", …; "unknown" for DType::unknown.
constexpr std::string_view dtype_name(DType dtype) {
    if (dtype == DType::unknown) return "unknown";
    return detail::dtype_table[static_cast<std::size_t>(dtype)].name;
}

/// Bytes of one element; 0 for DType::unknown.
constexpr std::size_t dtype_size(DType dtype) {
    if (dtype == DType::unknown) return 0;
    return detail::dtype_table[static_cast<std::size_t>(dtype)].bytes;
}

/// The inverse of `dtype_name`; nothing for an unknown name.
constexpr std::optional<DType> parse_dtype(std::string_view name) {
    for (const detail::DTypeRow& row : detail::dtype_table)
        if (row.name == name) return row.dtype;
    return std::nullopt;
}

/// Whether T is one of our floating-point types.
template <typename T>
inline constexpr bool is_file_float = std::floating_point<T> || HalfPrecision<T>;

/// The element type of a file that holds `T` bit for bit.
template <typename T>
constexpr DType dtype_of() {
    static_assert(is_file_float<T> || std::integral<T>,
                  "colt5: files hold float, double, bfloat16, float16, bool and integers");
    if constexpr (std::same_as<T, bool>)
        return DType::boolean;
    else if constexpr (std::same_as<T, double>)
        return DType::f64;
    else if constexpr (std::same_as<T, float>)
        return DType::f32;
    else if constexpr (std::same_as<T, bfloat16>)
        return DType::bf16;
    else if constexpr (std::same_as<T, float16>)
        return DType::f16;
    else if constexpr (std::signed_integral<T>)
        return sizeof(T) == 8 ? DType::i64 : sizeof(T) == 4 ? DType::i32 : sizeof(T) == 2 ? DType::i16 : DType::i8;
    else
        return sizeof(T) == 8 ? DType::u64 : sizeof(T) == 4 ? DType::u32 : sizeof(T) == 2 ? DType::u16 : DType::u8;
}

/// Whether tensors of this type in a file can be read as `T`: floating-point numbers as such, everything else as
/// integers and bool. The 8-bit floating-point types are carried as bytes only.
template <typename T>
constexpr bool dtype_converts_to(DType dtype) {
    switch (dtype) {
        case DType::f64:
        case DType::f32:
        case DType::f16:
        case DType::bf16:
            return is_file_float<T>;
        case DType::f8_e4m3:
        case DType::f8_e5m2:
        case DType::unknown:
            return false;
        default:
            return std::integral<T>;
    }
}

}  // namespace colt5
