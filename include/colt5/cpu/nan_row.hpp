// SPDX-License-Identifier: MIT
#pragma once

#include <limits>

#include <colt5/core/error.hpp>

namespace colt5::cpu {

/// NaN for real tokens, 0 for masked ones: what a row gives and takes in which a real logit is NaN.
template <typename T>
void fill_nan_row(T* row, Index length, const bool* real) {
    for (Index i = 0; i < length; ++i) row[i] = !real || real[i] ? std::numeric_limits<T>::quiet_NaN() : T(0);
}

}  // namespace colt5::cpu
