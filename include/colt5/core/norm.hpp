// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <concepts>
#include <limits>

#include <colt5/core/macros.hpp>

/// What norms need where the squares of numbers leave the range of float or double, though the numbers do not.
namespace colt5 {

/// Powers of two. The squares of numbers whose sum of squares overflows, times the first, and of numbers whose sum is
/// below least_sum_of_squares, times the second, are normal numbers, and so are sums of 2^30 of them.
template <std::floating_point T>
inline constexpr T scale_of_large = std::same_as<T, double> ? T(0x1p-768) : T(0x1p-96);
template <std::floating_point T>
inline constexpr T scale_of_small = 1 / scale_of_large<T>;
/// A sum of squares below this may lack some that were too small to be normal.
template <std::floating_point T>
inline constexpr T least_sum_of_squares = std::same_as<T, double> ? T(0x1p-800) : T(0x1p-80);

/// √Σ x² within the rounding of the sum, for any x: sum_of_squares(scale) is Σ (scale · x)².
template <std::floating_point T, typename SumOfSquares>
COLT5_HOST_DEVICE T scaled_norm(const SumOfSquares& sum_of_squares) {
    const T sum = sum_of_squares(T(1));
    if (sum >= least_sum_of_squares<T> && sum <= std::numeric_limits<T>::max()) return std::sqrt(sum);
    const T scale = sum < least_sum_of_squares<T> ? scale_of_small<T> : scale_of_large<T>;
    return std::sqrt(sum_of_squares(scale)) / scale;
}

}  // namespace colt5
