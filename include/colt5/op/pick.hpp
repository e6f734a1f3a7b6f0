// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/op/gather.hpp>

namespace colt5 {

template <typename P>
void pick_scores_kernel(const P&, ...) {
    static_assert(
        has_kernel<P>,
        "colt5: no `pick_scores` kernel for this policy; for Cuda include <colt5/cuda.cuh> and compile with nvcc");
}
template <typename P>
void straight_through_scores_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `straight_through_scores` kernel for this policy; for Cuda include <colt5/cuda.cuh> and "
                  "compile with nvcc");
}
template <typename P>
void place_scores_kernel(const P&, ...) {
    static_assert(
        has_kernel<P>,
        "colt5: no `place_scores` kernel for this policy; for Cuda include <colt5/cuda.cuh> and compile with nvcc");
}

/// The scores of the chosen tokens: scores[b, r, indices[b, r, i]], or 1 where `scores` is absent; 0 at masked tokens.
///
///     scores (b, r, n) or absent, indices (b, r, k), mask (b, n) or absent  →  (b, r, k)
///
/// Throws ValueError when n is 2^31 or more, and on the CPU when an index is not in [0, n).
template <typename Logit, Policy P, Viewable Indices>
auto pick_scores(const P& policy, TokensView<const Logit> scores, const Indices& indices, Mask mask) {
    if (scores) expect_shape("scores", scores.shape(), {indices.extent(0), indices.extent(1), dynamic});
    if (mask) expect_shape("mask", mask.shape(), {indices.extent(0), scores ? scores.extent(2) : dynamic});
    if (scores) expect_length("scores", scores.extent(2));
    if (mask) expect_length("mask", mask.extent(1));
    Tensor<Logit, P, dynamic, dynamic, dynamic> out(policy, indices.shape());
    pick_scores_kernel(policy, out.view(), scores, indices.const_view(), mask);
    return out;
}

/// The value of scores under straight-through, s + (1 − s) without a gradient: 1, or 0 at masked tokens, for tokens
/// that top_k chose. NaN where s would be, at all real tokens of a row with a real logit that is NaN: top_k puts it
/// first.
///
///     logits (b, r, n), indices (b, r, k), mask (b, n) or absent  →  (b, r, k)
///
/// Throws ValueError when n is 2^31 or more, and on the CPU when an index is not in [0, n).
template <Policy P, Viewable L, Viewable Indices>
auto straight_through_scores(const P& policy, const L& logits, const Indices& indices, Mask mask) {
    expect_shape("logits", logits.shape(), {indices.extent(0), indices.extent(1), dynamic});
    expect_length("logits", logits.extent(2));
    if (mask) expect_shape("mask", mask.shape(), {indices.extent(0), logits.extent(2)});
    Tensor<typename L::value_type, P, dynamic, dynamic, dynamic> scores(policy, indices.shape());
    straight_through_scores_kernel(policy, scores.view(), logits.const_view(), indices.const_view(), mask);
    return scores;
}

/// Vector-Jacobian product of pick_scores: zeros (b, r, n) with the gradients at the chosen tokens that are not masked.
/// The indices of a row must be distinct. Throws ValueError when `length` is no number of tokens, and on the CPU when
/// an index is not in [0, length).
template <Policy P, Viewable D, Viewable Indices>
auto place_scores(const P& policy, const D& d_picked, const Indices& indices, Mask mask, Index length) {
    expect_shape("d_picked", d_picked.shape(), indices.shape());
    expect_value(length >= 0, "length", ">= 0", length);
    expect_length("length", length);
    if (mask) expect_shape("mask", mask.shape(), {indices.extent(0), length});
    Tensor<typename D::value_type, P, dynamic, dynamic, dynamic> d_scores(
        policy, {indices.extent(0), indices.extent(1), length});
    place_scores_kernel(policy, d_scores.view(), d_picked.const_view(), indices.const_view(), mask);
    return d_scores;
}

}  // namespace colt5
