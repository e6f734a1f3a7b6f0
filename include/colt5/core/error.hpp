// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace colt5 {

/// Sizes and indices are signed, as in Eigen: differences of indices are meaningful and loops need no casts.
using Index = std::ptrdiff_t;

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

/// "(2, any, 512)": dimensions that may take any value are negative.
template <std::size_t Rank>
std::string shape_string(const std::array<Index, Rank>& shape) {
    std::ostringstream text;
    text << '(';
    for (std::size_t i = 0; i < Rank; ++i) {
        if (i > 0) text << ", ";
        if (shape[i] < 0)
            text << "any";
        else
            text << shape[i];
    }
    text << ')';
    return text.str();
}

template <std::size_t Rank, std::size_t ActualRank>
[[noreturn]] void throw_shape_error(std::string_view argument, const std::array<Index, Rank>& expected,
                                    const std::array<Index, ActualRank>& actual) {
    throw ShapeError("colt5: `" + std::string(argument) + "` must have shape " + shape_string(expected) + ", but has " +
                     shape_string(actual));
}

/// Throws ShapeError unless `actual` equals `expected`, where negative expected dimensions match anything.
template <std::size_t Rank>
constexpr void expect_shape(std::string_view argument, const std::array<Index, Rank>& actual,
                            const std::array<Index, Rank>& expected) {
    for (std::size_t i = 0; i < Rank; ++i)
        if (expected[i] >= 0 && expected[i] != actual[i]) throw_shape_error(argument, expected, actual);
}

/// Throws ValueError: "colt5: `argument` must be CONDITION, but is VALUE".
template <typename Value>
void expect_value(bool holds, std::string_view argument, std::string_view condition, const Value& value) {
    if (holds) return;
    std::ostringstream text;
    text << "colt5: `" << argument << "` must be " << condition << ", but is " << value;
    throw ValueError(text.str());
}

}  // namespace colt5
