// SPDX-License-Identifier: MIT
#pragma once

// Elements of tensors in files, and how messages show them.

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <colt5/core/error.hpp>
#include <colt5/core/view.hpp>
#include <colt5/io/dtype.hpp>
#include <colt5/io/file.hpp>

static_assert(std::endian::native == std::endian::little, "colt5: files of tensors need a little-endian machine");

namespace colt5::detail {

/// In backquotes and, for messages that stay readable whatever a file holds, cut after 200 bytes.
inline std::string backquoted(std::string_view text) {
    constexpr std::size_t longest = 200;
    const std::string quoted = concat({"`", printable(text, longest), "`"});
    return text.size() <= longest ? quoted : concat({quoted, " (", std::to_string(text.size()), " bytes)"});
}

/// "(2, 512)"; "()" for a single number; after 16 numbers only how many there are.
template <typename Extent>
std::string list_string(const std::vector<Extent>& numbers) {
    constexpr std::size_t longest = 16;
    std::string text = "(";
    for (std::size_t i = 0; i < std::min(numbers.size(), longest); ++i)
        text.append(i > 0 ? ", " : "").append(std::to_string(numbers[i]));
    if (numbers.size() > longest) text.append(", …: ").append(std::to_string(numbers.size())).append(" numbers");
    return text.append(")");
}

/// What can be counted in bytes of a file or elements of a tensor.
inline constexpr auto largest_count = static_cast<std::uint64_t>(std::numeric_limits<Index>::max());

/// Bytes of a tensor (elements, if its type is unknown); nothing when that number does not fit.
template <typename Extent>
std::optional<std::uint64_t> tensor_bytes(DType dtype, const std::vector<Extent>& shape) {
    constexpr std::uint64_t largest = largest_count;
    std::uint64_t bytes = std::max(dtype_size(dtype), std::size_t{1});
    for (const Extent signed_or_unsigned : shape) {
        const auto extent = static_cast<std::uint64_t>(signed_or_unsigned);
        if (extent > largest || (extent > 0 && bytes > largest / extent)) return std::nullopt;
        bytes *= extent;
    }
    return bytes;
}

/// Whether a number of a file is one of T's.
template <typename T, typename Stored>
bool holds_value(Stored value) {
    if constexpr (is_file_float<T>)
        return true;
    else if constexpr (std::same_as<T, bool>)
        return value == 0 || value == 1;
    else
        return std::in_range<T>(value);
}

/// Reads all elements of a tensor, as SafetensorsFile::read says. `read_at(offset, bytes)` fills `bytes` from the
/// tensor's `offset` on; `fail(what)` throws a message whose subject is the tensor, as in "holds <f4, which …";
/// `type_text` is how the file spells `dtype`.
template <typename T, typename ReadAt, typename Fail>
void read_elements(DType dtype, std::string_view type_text, std::span<T> values, const ReadAt& read_at,
                   const Fail& fail) {
    static_assert(is_file_float<T> || std::integral<T>,
                  "colt5: tensors are read as float, double, bfloat16, float16, bool or integers");
    const auto refuse = [&] {
        fail(concat({"holds ", printable(type_text), ", which does not convert to ", dtype_name(dtype_of<T>())}));
    };
    // In pieces, so that no second copy of a large tensor exists.
    const auto convert = [&]<typename Stored, typename Decode>(Stored, const Decode& decode) {
        using Value = std::decay_t<std::invoke_result_t<Decode, Stored>>;
        if constexpr (std::floating_point<Value> != is_file_float<T>) {
            refuse();
        } else if constexpr (std::same_as<Stored, T>) {
            read_at(std::uint64_t{0}, std::as_writable_bytes(values));
        } else {
            constexpr std::size_t piece = std::size_t{1} << 16;
            std::vector<Stored> stored(std::min(piece, values.size()));
            for (std::size_t done = 0; done < values.size(); done += piece) {
                const auto part = std::span(stored).first(std::min(piece, values.size() - done));
                read_at(std::uint64_t{done} * sizeof(Stored), std::as_writable_bytes(part));
                for (std::size_t i = 0; i < part.size(); ++i) {
                    const Value value = decode(part[i]);
                    if (!holds_value<T>(value))
                        fail(concat({"holds ", std::to_string(value), " at position ", std::to_string(done + i),
                                     ", which ", dtype_name(dtype_of<T>()), " cannot hold"}));
                    values[done + i] = static_cast<T>(value);
                }
            }
        }
    };
    const auto widen = [](auto value) { return static_cast<float>(value); };
    switch (dtype) {
        case DType::f64:
            return convert(double{}, std::identity{});
        case DType::f32:
            return convert(float{}, std::identity{});
        case DType::f16:
            return convert(float16{}, widen);
        case DType::bf16:
            return convert(bfloat16{}, widen);
        case DType::i64:
            return convert(std::int64_t{}, std::identity{});
        case DType::i32:
            return convert(std::int32_t{}, std::identity{});
        case DType::i16:
            return convert(std::int16_t{}, std::identity{});
        case DType::i8:
            return convert(std::int8_t{}, std::identity{});
        case DType::u64:
            return convert(std::uint64_t{}, std::identity{});
        case DType::u32:
            return convert(std::uint32_t{}, std::identity{});
        case DType::u16:
            return convert(std::uint16_t{}, std::identity{});
        case DType::u8:
        case DType::boolean:
            return convert(std::uint8_t{}, std::identity{});
        case DType::f8_e4m3:
        case DType::f8_e5m2:
        case DType::unknown:
            return refuse();
    }
}

}  // namespace colt5::detail
