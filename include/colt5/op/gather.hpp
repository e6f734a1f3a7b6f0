// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <type_traits>

#include <colt5/core/tensor.hpp>
#include <colt5/expr/assign.hpp>

namespace colt5 {

/// A number of tokens for each sample: of_sample[b] if `of_sample` (b, in the policy's memory) is given, otherwise
/// `all`. The host cannot read of_sample; for shapes and checks it uses `all`, which must be an upper bound.
struct SampleCount {
    Index all;
    const TokenIndex* of_sample = nullptr;

    SampleCount(Index count, VectorView<const TokenIndex> of_each = {})  // NOLINT: converts
        : all(count), of_sample(of_each.data()) {}
    COLT5_HOST_DEVICE Index operator()(Index sample) const { return of_sample != nullptr ? of_sample[sample] : all; }
};

template <typename P>
void gather_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `gather` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void scatter_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `scatter` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void scatter_mean_weights_kernel(const P&, ...) {
    static_assert(
        has_kernel<P>,
        "colt5: no `scatter_mean_weights` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void gather_mask_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `gather_mask` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

template <typename P>
void pick_scores_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `pick_scores` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void straight_through_scores_kernel(const P&, ...) {
    static_assert(
        has_kernel<P>,
        "colt5: no `straight_through_scores` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void place_scores_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `place_scores` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

template <typename P>
void short_rows_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `short_rows` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// How `scatter` treats the row that is already there, and rows that go to the same place.
enum class Scatter {
    add,        ///< adds them all
    mean,       ///< adds the mean of the rows that go to the same place to the row that is there
    overwrite,  ///< the last one replaces what is there
};

namespace detail {
/// The shape of what gather returns: (b, k, d) for indices (b, k), and (b, r, k, d) for (b, r, k)
template <typename Indices>
auto picked_shape(const Indices& indices, Index dim) {
    if constexpr (Indices::rank == 2)
        return std::array{indices.extent(0), indices.extent(1), dim};
    else
        return std::array{indices.extent(0), indices.extent(1), indices.extent(2), dim};
}
/// Indices of any rank as (b, picks)
template <typename Indices>
auto flat_indices(const Indices& indices, Index batch) {
    static_assert(are_indices<Indices>, "colt5: `indices` must be of TokenIndex");
    auto expected = indices.shape();
    expected.fill(dynamic);
    expected[0] = batch;
    expect_shape("indices", indices.shape(), expected);
    Index picks = 1;
    for (std::size_t axis = 1; axis < Indices::rank; ++axis) picks *= indices.extent(axis);
    return indices.const_view().reshape(std::array{batch, picks});
}
/// Indices (b, k), or (b, r, k) as (b · r, k)
template <typename Indices>
auto indices_by_route(const Indices& indices) {
    if constexpr (Indices::rank == 2)
        return indices.const_view();
    else
        return indices.const_view().reshape(std::array{indices.extent(0) * indices.extent(1), indices.extent(2)});
}
/// out (b, k, d) = the rows of x (b, n, d) at `flat` (b, k)
template <typename P, typename T, typename X>
void gather_rows(const P& policy, TokensView<T> out, const X& x, MatrixView<const TokenIndex> flat,
                 [[maybe_unused]] Mask clean_mask) {
    if constexpr (cleans_as_it_reads<P>)
        gather_kernel(policy, out, x.const_view(), flat, clean_mask);
    else
        gather_kernel(policy, out, x.const_view(), flat);
}
}  // namespace detail

// Indices out of range: on the CPU, every operation that takes indices checks them all before it writes any result, and
// throws ValueError. (pick_scores without scores and without mask knows no range and checks nothing.) On a GPU indices
// are not checked, because the host would have to wait for them; what a kernel does with a wrong one is undefined.

/// The chosen rows of each sequence:  out[b, …, i] = x[b, indices[b, …, i]]
///
///     x (b, n, d), indices (b, k) or (b, r, k), each in [0, n)  →  (b, k, d) or (b, r, k, d)
///
/// Throws ValueError when n is 2^31 or more, and on the CPU when an index is out of its range. If the policy cleans
/// padding as it reads (see core/policy.hpp), a value that is not finite becomes 0 in a token whose `clean_mask`
/// (b, n) is false; other policies ignore `clean_mask`.
template <Policy P, Viewable X, Viewable Indices>
auto gather(const P& policy, const X& x, const Indices& indices, Mask clean_mask = {}) {
    using Scalar = typename X::value_type;
    const auto [batch, length, dim] = x.shape();
    expect_length("x", length);
    const auto flat = detail::flat_indices(indices, batch);
    using Out = std::conditional_t<Indices::rank == 2, TokensTensor<Scalar, P>,
                                   Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic>>;
    Out out(policy, detail::picked_shape(indices, dim));
    detail::gather_rows(policy, out.view().reshape(std::array{batch, flat.extent(1), dim}), x, flat, clean_mask);
    return out;
}

/// The same without a clean_mask, written to out (b, k, d).
template <Policy P, Viewable X, Viewable Indices>
requires(Indices::rank == 2) void gather(const P& policy, TokensView<typename X::value_type> out, const X& x,
                                         const Indices& indices) {
    expect_length("x", x.extent(1));
    const auto flat = detail::flat_indices(indices, x.extent(0));
    expect_shape("out", out.shape(), detail::picked_shape(indices, x.extent(2)));
    detail::gather_rows(policy, out, x, flat, {});
}

/// The mask at the chosen tokens: mask (b, n), indices (b, r, k)  →  (b, r, k), or an empty tensor when there is no
/// mask.
template <Policy P, Viewable Indices>
auto gather_mask(const P& policy, Mask mask, const Indices& indices) {
    static_assert(are_indices<Indices>, "colt5: `indices` must be of TokenIndex");
    if (!mask) return Tensor<bool, P, dynamic, dynamic, dynamic>();
    expect_shape("mask", mask.shape(), {indices.extent(0), dynamic});
    expect_length("mask", mask.extent(1));
    Tensor<bool, P, dynamic, dynamic, dynamic> out(policy, indices.shape());
    gather_mask_kernel(policy, out.view(), mask, indices.const_view());
    return out;
}

/// Puts rows back where they came from:  out[b, indices[b, i]] ← scale[b, i] · rows[b, i], combined as `how` says
///
///     out (b, n, d), rows (b, k, d), indices (b, k), each in [0, n), scale (b, k), or absent for 1
///
/// Rows that meet in one place are combined in the order of i: the result does not depend on threads. Unless `how` is
/// overwrite, nothing is added of a row with a scale of 0, whatever it holds (in a mean it counts as a row of 0): such
/// rows are of picks that a causal router leaves unused, and which these are depends on later tokens. Throws ValueError
/// when n or k is 2^31 or more, and on the CPU, before anything is written, when an index is out of its range.
template <Policy P, Viewable Rows, Viewable Indices>
requires(Indices::rank == 2) void scatter(const P& policy, Scatter how, TokensView<typename Rows::value_type> out,
                                          const Rows& rows, const Indices& indices,
                                          MatrixView<const accumulate_t<typename Rows::value_type>> scale = {}) {
    static_assert(are_indices<Indices>, "colt5: `indices` must be of TokenIndex");
    expect_shape("rows", rows.shape(), {out.extent(0), indices.extent(1), out.extent(2)});
    expect_shape("indices", indices.shape(), {out.extent(0), dynamic});
    if (scale) expect_shape("scale", scale.shape(), indices.shape());
    expect_length("out", out.extent(1));
    expect_length("rows", rows.extent(1));
    scatter_kernel(policy, how, out, rows.const_view(), indices.const_view(), scale);
}

/// The same for the rows of several routes, rows (b, r · k, d), one route after the other, indices and scale (b, r, k).
/// With add and mean, rows of different routes are added; mean takes the mean of those of one route that go to the same
/// place. With overwrite the last row of the last route replaces the others.
template <Policy P, Viewable Rows, Viewable Indices>
requires(Indices::rank == 3) void scatter(const P& policy, Scatter how, TokensView<typename Rows::value_type> out,
                                          const Rows& rows, const Indices& indices,
                                          TokensView<const accumulate_t<typename Rows::value_type>> scale = {}) {
    using Sum = accumulate_t<typename Rows::value_type>;
    const auto [batch, routes, picks] = indices.shape();
    const auto flat = detail::flat_indices(indices, out.extent(0));  // (b, r · k)
    if (scale) expect_shape("scale", scale.shape(), indices.shape());
    auto factors = scale ? scale.reshape(flat.shape()) : MatrixView<const Sum>();
    TokensTensor<Sum, P> weights;
    if (how == Scatter::mean && routes > 1) {
        weights = {policy, {batch * routes, picks, 1}};
        if (scale)
            assign(policy, weights, scale.reshape(weights.shape()));
        else
            assign(policy, weights, Sum(1));
        scatter_mean_weights_kernel(policy, weights.view(), detail::indices_by_route(indices));
        factors = weights.const_view().reshape(flat.shape());
        how = Scatter::add;
    }
    scatter(policy, how, out, rows, flat, factors);
}

/// Vector-Jacobian product of scatter with respect to `rows`, without scale: gather(d_out, indices). For Scatter::mean
/// each row of it is divided by the number of rows, of its route, that went to the same place. (The gradient of the old
/// `out` is not computed here: it is d_out, for `overwrite` with zeros in the overwritten rows.) For `overwrite` the
/// indices of a sequence must be distinct. Returns d_rows (b, k, d), or of several routes (b, r · k, d).
template <Policy P, Viewable D, Viewable Indices>
auto scatter_vjp(const P& policy, Scatter how, const D& d_out, const Indices& indices) {
    auto d_rows = gather(policy, d_out, detail::flat_indices(indices, d_out.extent(0)));
    if (how == Scatter::mean) {
        const auto by_route = detail::indices_by_route(indices);
        scatter_mean_weights_kernel(
            policy, d_rows.view().reshape(std::array{by_route.extent(0), by_route.extent(1), d_out.extent(2)}),
            by_route);
    }
    return d_rows;
}

/// Vector-Jacobian product of gather, accumulated into d_x (b, n, d), which other branches share: scatter with add.
template <Policy P, Viewable D, Viewable Indices>
void gather_vjp(const P& policy, TokensView<typename D::value_type> d_x, const D& d_out, const Indices& indices) {
    const auto flat = detail::flat_indices(indices, d_x.extent(0));
    expect_shape("d_out", d_out.shape(), detail::picked_shape(indices, d_x.extent(2)));
    scatter(policy, Scatter::add, d_x,
            d_out.const_view().reshape(std::array{flat.extent(0), flat.extent(1), d_x.extent(2)}), flat);
}

/// The scores of the chosen tokens: scores[b, r, indices[b, r, i]], or 1 where `scores` is absent; 0 at masked tokens.
///
///     scores (b, r, n) or absent, indices (b, r, k), mask (b, n) or absent  →  (b, r, k)
///
/// Throws ValueError when n is 2^31 or more, and on the CPU when an index is not in [0, n).
template <typename Logit, Policy P, Viewable Indices>
auto pick_scores(const P& policy, TokensView<const Logit> scores, const Indices& indices, Mask mask) {
    static_assert(are_indices<Indices>, "colt5: `indices` must be of TokenIndex");
    if (scores) expect_shape("scores", scores.shape(), {indices.extent(0), indices.extent(1), dynamic});
    if (mask) expect_shape("mask", mask.shape(), {indices.extent(0), scores ? scores.extent(2) : dynamic});
    if (scores) expect_length("scores", scores.extent(2));
    if (mask) expect_length("mask", mask.extent(1));
    Tensor<Logit, P, dynamic, dynamic, dynamic> out(policy, indices.shape());
    pick_scores_kernel(policy, out.view(), scores, indices.const_view(), mask);
    return out;
}

/// Straight-through scores of the tokens that top_k chose: 1 at real tokens, 0 at masked ones. (It is the value of
/// s + (1 − s), where no gradient goes through the bracket.) If the first chosen logit of a row is NaN, all its real
/// tokens get NaN, as s would be NaN for them. Looking at the first is enough: top_k puts real NaN logits first.
///
///     logits (b, r, n), indices (b, r, k), mask (b, n) or absent  →  (b, r, k)
///
/// Throws ValueError when n is 2^31 or more, and on the CPU when an index is not in [0, n).
template <Policy P, Viewable L, Viewable Indices>
auto straight_through_scores(const P& policy, const L& logits, const Indices& indices, Mask mask) {
    static_assert(are_indices<Indices>, "colt5: `indices` must be of TokenIndex");
    expect_shape("logits", logits.shape(), {indices.extent(0), indices.extent(1), dynamic});
    expect_length("logits", logits.extent(2));
    if (mask) expect_shape("mask", mask.shape(), {indices.extent(0), logits.extent(2)});
    Tensor<typename L::value_type, P, dynamic, dynamic, dynamic> scores(policy, indices.shape());
    straight_through_scores_kernel(policy, scores.view(), logits.const_view(), indices.const_view(), mask);
    return scores;
}

/// Vector-Jacobian product of pick_scores: zeros (b, r, n) with the gradients at the chosen tokens that are not masked.
/// The indices of a row must be distinct. Throws ValueError when `length` is negative, or 2^31 or more, and on the CPU
/// when an index is not in [0, length).
template <Policy P, Viewable D, Viewable Indices>
auto place_scores(const P& policy, const D& d_picked, const Indices& indices, Mask mask, Index length) {
    static_assert(are_indices<Indices>, "colt5: `indices` must be of TokenIndex");
    expect_shape("d_picked", d_picked.shape(), indices.shape());
    expect_value(length >= 0, "length", ">= 0", length);
    expect_length("length", length);
    if (mask) expect_shape("mask", mask.shape(), {indices.extent(0), length});
    Tensor<typename D::value_type, P, dynamic, dynamic, dynamic> d_scores(
        policy, {indices.extent(0), indices.extent(1), length});
    place_scores_kernel(policy, d_scores.view(), d_picked.const_view(), indices.const_view(), mask);
    return d_scores;
}

/// The scores of sequences with at most k real tokens, which are not routed, become 1, and 0 at masked tokens. Other
/// rows stay as they are.
///
///     scores (b, r, m), indices (b, r, m), mask (b, n)
///
/// Throws ValueError when n is 2^31 or more, and on the CPU when an index is not in [0, n).
template <typename Logit, Policy P, Viewable Indices>
void set_short_scores(const P& policy, TokensView<Logit> scores, const Indices& indices, Mask mask, SampleCount k) {
    static_assert(are_indices<Indices>, "colt5: `indices` must be of TokenIndex");
    expect_shape("scores", scores.shape(), indices.shape());
    expect_shape("mask", mask.shape(), {indices.extent(0), dynamic});
    expect_length("mask", mask.extent(1));
    short_rows_kernel(policy, scores, TokensView<const TokenIndex>(indices), mask, k);
}

/// The vector-Jacobian product of that, with respect to logits: d_logits (b, r, n) of such rows become 0.
template <typename Logit, Policy P>
void set_short_scores_vjp(const P& policy, TokensView<Logit> d_logits, Mask mask, SampleCount k) {
    expect_shape("mask", mask.shape(), {d_logits.extent(0), d_logits.extent(2)});
    short_rows_kernel(policy, d_logits, TokensView<const TokenIndex>(), mask, k);
}

}  // namespace colt5
