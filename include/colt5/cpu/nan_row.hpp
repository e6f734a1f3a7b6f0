// SPDX-License-Identifier: MIT
#pragma once

#include <limits>

#include <colt5/cpu/simd.hpp>

namespace colt5::cpu {

/// The largest of a row, −∞ of none; NaN if one of them is.
template <typename T>
T largest_or_nan(const T* row, Index length) {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    Batch<T> top(-infinity), nan_or_zero(T(0));
    for_each_batch<T>(length, [&](Index j, Index width) {
        Batch<T> s = load(row + j, width);
        if (width < lanes<T>) s = pad(s, width, -infinity);
        nan_or_zero = xsimd::select(s == s, nan_or_zero, s);
        top = xsimd::max(top, s);
    });
    return reduce_max(top) + reduce_add(nan_or_zero);
}

/// NaN for real tokens, 0 for masked ones: the scores of a row in which a real logit is NaN, and the gradient of its
/// logits.
template <typename T>
void fill_nan_row(T* row, Index length, const bool* real) {
    for (Index i = 0; i < length; ++i) row[i] = !real || real[i] ? std::numeric_limits<T>::quiet_NaN() : T(0);
}

}  // namespace colt5::cpu
