// SPDX-License-Identifier: MIT
#pragma once

// What the library needs of the compiler's flags. Every header includes this one.
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__NO_SIGNED_ZEROS__)
#error "colt5: needs NaN, infinities and sums in order: compile without -ffast-math, -Ofast, -ffinite-math-only"
#endif
#if !defined(__cpp_exceptions)
#error "colt5: reports errors by exceptions: compile without -fno-exceptions"
#endif

// Function-like macros of these names break std::min and std::max. The standard library and Eigen remove them, too.
#undef min
#undef max

// Functions that run on the host and, when nvcc compiles them, on the device too.
#if defined(__CUDACC__)
#define COLT5_HOST_DEVICE __host__ __device__
#else
#define COLT5_HOST_DEVICE
#endif
