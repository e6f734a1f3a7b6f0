// SPDX-License-Identifier: MIT
#pragma once

// What must hold before anything else of the library is read, and our macro. Every header includes this one, most of
// them through core/error.hpp.

// The compiler's flags.
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__NO_SIGNED_ZEROS__)
#error "colt5: needs NaN, infinities and sums in order: compile without -ffast-math, -Ofast, -ffinite-math-only"
#endif
#if !defined(__cpp_exceptions)
#error "colt5: reports errors by exceptions: compile without -fno-exceptions"
#endif

// Macros of these names break std::min and std::max. They are gone for the including program, too: the standard library
// and Eigen do the same.
#undef min
#undef max

// Functions that run on the host and, when nvcc compiles them, on the device too.
#if defined(__CUDACC__)
#define COLT5_HOST_DEVICE __host__ __device__
#else
#define COLT5_HOST_DEVICE
#endif
