// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/core/macros.hpp>  // first: it removes macros

#include <initializer_list>
#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace colt5 {

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

// The functions of this file and the checks of view.hpp that make messages are kept out of their callers, which have
// many of them and compile the faster.

/// The value as a message shows it, whatever the program's locale: no thousands separators.
template <typename Value>
[[gnu::noinline]] std::string value_string(const Value& value) {
    std::ostringstream text;
    text.imbue(std::locale::classic());
    text << value;
    return text.str();
}

namespace detail {

/// The parts one after the other. Of `"…" + std::to_string(i)`, GCC 12 warns falsely at -O3 (its bug 105651).
[[gnu::noinline]] inline std::string concat(std::initializer_list<std::string_view> parts) {
    std::string text;
    for (const std::string_view part : parts) text += part;
    return text;
}

}  // namespace detail

}  // namespace colt5
