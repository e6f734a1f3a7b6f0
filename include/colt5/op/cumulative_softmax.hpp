// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/op/divisor.hpp>
#include <colt5/op/gather.hpp>

namespace colt5 {

template <typename P>
void cumulative_softmax_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `cumulative_softmax` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void cumulative_softmax_vjp_kernel(const P&, ...) {
    static_assert(
        has_kernel<P>,
        "colt5: no `cumulative_softmax_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// The sum that an exponential is divided by is never taken to be smaller than this.
inline constexpr double cumulative_softmax_floor = 1e-6;

namespace detail {
template <typename L, typename Indices>
void check_cumulative_softmax(double temperature, const L& logits, const Indices& indices, Mask mask) {
    static_assert(are_indices<Indices>, "colt5: `indices` must be of TokenIndex");
    expect_divisor("temperature", temperature);
    if (mask) expect_shape("mask", mask.shape(), {logits.extent(0), logits.extent(2)});
    expect_shape("indices", indices.shape(), {logits.extent(0), logits.extent(1), dynamic});
    expect_length("logits", logits.extent(2));
}
}  // namespace detail

/// Scores of the k largest logits by cumulative softmax. Among the logits of a row in descending order, with their
/// maximum subtracted (as a constant) and e_i = exp(s_i / temperature):
///
///     score_i = e_i / max(Σ_{j ranked at or below i} e_j, 1e-6)
///
///     logits (b, r, n), mask (b, n) or absent, indices (b, r, k) as top_k returns them  →  scores (b, r, k)
///
/// No sort of the whole row is needed: what is not chosen enters as one sum. Masked tokens have e = 0. Logits of +∞
/// count as the largest number. A NaN among the real logits of a row makes the scores and gradients of all its real
/// tokens NaN. Throws ValueError when n is 2^31 or more, and on the CPU when an index is not in [0, n).
template <Policy P, Viewable L, Viewable Indices>
auto cumulative_softmax(const P& policy, double temperature, const L& logits, const Indices& indices, Mask mask) {
    detail::check_cumulative_softmax(temperature, logits, indices, mask);
    Tensor<typename L::value_type, P, dynamic, dynamic, dynamic> scores(policy, indices.shape());
    cumulative_softmax_kernel(policy, scores.view(), logits.const_view(), indices.const_view(), mask, temperature);
    return scores;
}

/// Vector-Jacobian product of cumulative_softmax; gradients of masked picks are ignored. With C_i the sum and
/// c_i = −g_i e_i / C_i² (0 where C_i is below the floor):
///
///     ds_i = e_i / temperature · (g_i / max(C_i, 1e-6) [i chosen] + Σ_{j chosen, ranked at or above i} c_j)
///
/// Returns d_logits (b, r, n).
template <Policy P, Viewable D, Viewable L, Viewable Indices>
auto cumulative_softmax_vjp(const P& policy, double temperature, const D& d_scores, const L& logits,
                            const Indices& indices, Mask mask) {
    detail::check_cumulative_softmax(temperature, logits, indices, mask);
    static_assert(same_scalar<L, D>, "colt5: `d_scores` must have the scalar type of `logits`");
    expect_shape("d_scores", d_scores.shape(), indices.shape());
    auto d_logits = tensor_like(policy, logits);
    cumulative_softmax_vjp_kernel(policy, d_logits.view(), d_scores.const_view(), logits.const_view(),
                                  indices.const_view(), mask, temperature);
    return d_logits;
}

}  // namespace colt5
