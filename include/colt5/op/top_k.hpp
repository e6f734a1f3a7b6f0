// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstdint>
#include <type_traits>

#include <colt5/op/gather.hpp>

namespace colt5 {

template <typename P>
void top_k_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `top_k` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// Logits as unsigned integers in the order of choice, smallest first: that of descending logits, with −0 as 0, NaN of
/// any sign and payload before all numbers, and masked tokens after them.
template <std::floating_point T>
struct LogitRank {
    using type = std::conditional_t<sizeof(T) == sizeof(std::uint32_t), std::uint32_t, std::uint64_t>;
    static constexpr int bits = 8 * sizeof(T);
    static constexpr type masked = static_cast<type>(~type{0});

    COLT5_HOST_DEVICE static type of(T logit) {
        constexpr type sign = type{1} << (bits - 1);
        const auto pattern = std::bit_cast<type>(logit + T(0));  // −0 becomes 0
        const type rank = (pattern & sign) != 0 ? pattern : ~(pattern | sign);
        return logit != logit ? type{0} : rank;
    }
    /// The logit of a rank that is not `masked`, a NaN for 0.
    COLT5_HOST_DEVICE static T logit(type rank) {
        constexpr type sign = type{1} << (bits - 1);
        return std::bit_cast<T>((rank & sign) != 0 ? rank : static_cast<type>(~rank & ~sign));
    }
};

/// The k largest logits of each row, in descending order; ties go to the lower index. Masked tokens come after all
/// others, so that they are chosen only when fewer than k are real; NaN counts as the largest number.
///
///     logits (b, r, n), mask (b, n) or absent  →  indices (b, r, min(k, n))
///
/// Throws ValueError when k < 1, or when n is 2^31 or more.
template <Policy P, Viewable L>
auto top_k(const P& policy, const L& logits, Mask mask, Index k) {
    const auto [batch, routes, length] = logits.shape();
    if (mask) expect_shape("mask", mask.shape(), {batch, length});
    expect_value(k >= 1, "k", ">= 1", k);
    expect_length("logits", length);
    Tensor<TokenIndex, P, dynamic, dynamic, dynamic> indices(policy, {batch, routes, std::min(k, length)});
    top_k_kernel(policy, indices.view(), logits.const_view(), mask);
    return indices;
}

}  // namespace colt5
