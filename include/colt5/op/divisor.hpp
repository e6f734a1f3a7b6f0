// SPDX-License-Identifier: MIT
#pragma once

#include <string_view>

#include <colt5/core/view.hpp>

/// Options that logits and their differences are divided by: temperatures and the ε of the descent. Far outside these
/// bounds, where such a number or its inverse leaves the range of float, scores and gradients become NaN. Gradients,
/// which have the inverse as a factor, may become infinite before that.
namespace colt5 {

inline constexpr double smallest_divisor = 1e-6, largest_divisor = 1e6;

constexpr bool is_divisor(double value) {
    return value >= smallest_divisor && value <= largest_divisor;
}

/// Throws ValueError.
inline void expect_divisor(std::string_view argument, double value) {
    expect_value(value > 0, argument, "> 0", value);
    expect_value(is_divisor(value), argument, "in [1e-6, 1e6]", value);
}

}  // namespace colt5
