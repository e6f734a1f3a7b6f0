// SPDX-License-Identifier: MIT
#pragma once

#include <cstdlib>
#include <string_view>

#include <colt5/core/view.hpp>

#if defined(__SANITIZE_ADDRESS__)
#define COLT5_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(memory_sanitizer)
#define COLT5_SANITIZED 1
#endif
#endif

namespace colt5 {

/// How tensors get their memory. All but the first are there to find faults: slow, and on a GPU nothing can be captured
/// into a graph.
enum class Allocations {
    together,          ///< in ranges of addresses, which grow to the largest need
    separate,          ///< each by an allocation of its own, so that AddressSanitizer, valgrind or compute-sanitizer
                       ///< see what leaves it, or uses it after it is gone
    separate_with_nan  ///< the same, filled with NaN (integers: −1), which spread from what is read and was never
                       ///< written
};

/// Whether the compiler was told to find stray accesses (-fsanitize=address, memory).
#if defined(COLT5_SANITIZED)
inline constexpr bool is_sanitized = true;
#else
inline constexpr bool is_sanitized = false;
#endif

/// What the environment variable COLT5_ALLOCATIONS names (`together`, `separate`, `separate_with_nan`); without it
/// `separate` where the compiler looks for stray accesses, and `together` elsewhere. Throws ValueError for other names.
inline Allocations default_allocations() {
    const char* const name = std::getenv("COLT5_ALLOCATIONS");
    if (name == nullptr) return is_sanitized ? Allocations::separate : Allocations::together;
    const std::string_view wanted = name;
    if (wanted == "together") return Allocations::together;
    if (wanted == "separate") return Allocations::separate;
    expect_value(wanted == "separate_with_nan", "COLT5_ALLOCATIONS", "together, separate or separate_with_nan", wanted);
    return Allocations::separate_with_nan;
}

}  // namespace colt5
