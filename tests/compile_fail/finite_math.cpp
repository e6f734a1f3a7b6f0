// SPDX-License-Identifier: MIT
// expect: colt5: needs NaN, infinities and sums in order: compile without -ffast-math, -Ofast, -ffinite-math-only
// flags: -ffinite-math-only
#include <colt5/colt5.hpp>
