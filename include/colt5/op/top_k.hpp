// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/op/gather.hpp>

namespace colt5 {

template <typename P>
void top_k_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `top_k` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

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
