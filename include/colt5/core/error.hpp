// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/core/macros.hpp>  // first: it removes macros

#include <array>
#include <concepts>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace colt5 {

/// Sizes and indices are signed, as in Eigen: differences of indices are meaningful and loops need no casts.
using Index = std::ptrdiff_t;

/// ⌈a / b⌉ for a ≥ 0 and b > 0 of any size.
COLT5_HOST_DEVICE constexpr Index divide_up(Index a, Index b) {
    return a / b + (a % b != 0 ? 1 : 0);
}
/// The smallest multiple of `unit` that is not below n ≥ 0.
COLT5_HOST_DEVICE constexpr Index round_up(Index n, Index unit) {
    return divide_up(n, unit) * unit;
}
template <std::unsigned_integral N>
constexpr N round_up(N n, N unit) {
    return n / unit * unit + (n % unit != 0 ? unit : N{0});
}

/// Base of every exception that the library throws on purpose.
class Error : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

/// A tensor has the wrong shape. The message names the argument and prints the expected and the actual shape.
class ShapeError : public Error {
public:
    using Error::Error;
};

/// A number is out of its range. The message names the argument and prints the condition and the value.
class ValueError : public Error {
public:
    using Error::Error;
};

/// A file is not what it should be. The message names the file and the place.
class FileError : public Error {
public:
    using Error::Error;
};

/// There is not enough memory. The message says how much was asked for and how much there is.
class OutOfMemory : public Error {
public:
    using Error::Error;
};

/// The value as a message shows it, whatever the program's locale: no thousands separators.
template <typename Value>
std::string value_string(const Value& value) {
    std::ostringstream text;
    text.imbue(std::locale::classic());
    text << value;
    return text.str();
}

namespace detail {

/// The parts one after the other. Of `"…" + std::to_string(i)`, GCC 12 warns falsely at -O3 (its bug 105651).
inline std::string concat(std::initializer_list<std::string_view> parts) {
    std::string text;
    for (const std::string_view part : parts) text += part;
    return text;
}

}  // namespace detail

/// "(2, any, 512)": dimensions that may take any value are negative.
template <std::size_t Rank>
std::string shape_string(const std::array<Index, Rank>& shape) {
    std::string text = "(";
    for (std::size_t i = 0; i < Rank; ++i) {
        if (i > 0) text += ", ";
        text += shape[i] < 0 ? "any" : value_string(shape[i]);
    }
    return text += ')';
}

template <std::size_t Rank, std::size_t ActualRank>
[[noreturn]] void throw_shape_error(std::string_view argument, const std::array<Index, Rank>& expected,
                                    const std::array<Index, ActualRank>& actual) {
    throw ShapeError(detail::concat(
        {"colt5: `", argument, "` must have shape ", shape_string(expected), ", but has ", shape_string(actual)}));
}

/// Throws ShapeError unless `actual` equals `expected`, where negative expected dimensions match anything.
template <std::size_t Rank>
constexpr void expect_shape(std::string_view argument, const std::array<Index, Rank>& actual,
                            const std::array<Index, Rank>& expected) {
    for (std::size_t i = 0; i < Rank; ++i)
        if (expected[i] >= 0 && expected[i] != actual[i]) throw_shape_error(argument, expected, actual);
}

/// The same for an argument called `prefix` + `name`, which are put together only when it is wrong.
template <std::size_t Rank>
void expect_shape(std::string_view prefix, std::string_view name, const std::array<Index, Rank>& actual,
                  const std::array<Index, Rank>& expected) {
    if (actual != expected) throw_shape_error(std::string(prefix).append(name), expected, actual);
}

/// Throws ValueError: "colt5: `argument` must be CONDITION, but is VALUE".
template <typename Value>
void expect_value(bool holds, std::string_view argument, std::string_view condition, const Value& value) {
    if (holds) return;
    throw ValueError(std::string("colt5: `").append(argument).append("` must be ").append(condition) + ", but is " +
                     value_string(value));
}

/// The bytes of a tensor of this shape. Throws ValueError when an extent is negative, or when there are 2^63 bytes or
/// more, where an extent of 0 counts as 1: the strides of an empty tensor are numbers, too.
template <std::size_t Rank>
constexpr Index expect_bytes(std::string_view argument, const std::array<Index, Rank>& shape,
                             std::size_t bytes_of_element) {
    auto bytes = static_cast<Index>(bytes_of_element);
    bool is_empty = false, fits = true;
    for (const Index extent : shape) {
        if (extent < 0) expect_value(false, argument, "non-negative in every dimension", extent);
        is_empty = is_empty || extent == 0;
        fits = fits && !__builtin_mul_overflow(bytes, extent == 0 ? 1 : extent, &bytes);
    }
    if (!fits) expect_value(false, argument, "of less than 2^63 bytes", shape_string(shape));
    return is_empty ? 0 : bytes;
}

/// first + count <= size, without overflow.
constexpr bool is_range_of(Index first, Index count, Index size) {
    return first >= 0 && count >= 0 && first <= size && count <= size - first;
}

}  // namespace colt5
