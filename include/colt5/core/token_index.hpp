// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstdint>
#include <limits>
#include <string_view>

#include <colt5/core/error.hpp>

namespace colt5 {

/// Position of a token in its sequence.
using TokenIndex = std::int32_t;

/// Whether elements are positions of tokens.
template <typename Indices>
inline constexpr bool are_indices = std::same_as<typename Indices::value_type, TokenIndex>;

/// Throws ValueError when a sequence has more tokens than a TokenIndex can tell apart.
inline void expect_length(std::string_view argument, Index length) {
    expect_value(length <= std::numeric_limits<TokenIndex>::max(), argument, "of at most 2^31 - 1 tokens a sequence",
                 length);
}

}  // namespace colt5
