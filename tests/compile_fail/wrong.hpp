// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/colt5.hpp>

/// The first in the wrong program, the second in the right one.
template <typename T>
constexpr T wrong([[maybe_unused]] T bad, [[maybe_unused]] T good) {
#ifdef COLT5_COMPILE_FAIL_CONTROL
    return good;
#else
    return bad;
#endif
}

/// Instantiates a class.
template <typename T>
constexpr bool complete = sizeof(T) > 0;
