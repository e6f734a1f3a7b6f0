// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/core/tensor.hpp>
#include <colt5/expr/expr.hpp>

namespace colt5 {

template <typename P>
void unrouted_tokens_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `unrouted_tokens` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void null_query_vjp_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `null_query_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// Which real tokens were not chosen: indices (b, k), each in [0, n), mask (b, n) or absent  →  (b, n)
///
/// Picks whose `live` (b, k) is false choose no token; it may be absent.
///
/// Throws ValueError on the CPU when an index is out of its range.
template <Policy P, Viewable Indices>
auto unrouted_tokens(const P& policy, const Indices& indices, Mask mask, Index length, Mask live = {}) {
    static_assert(are_indices<Indices>, "colt5: `indices` must be of TokenIndex");
    if (mask) expect_shape("mask", mask.shape(), {indices.extent(0), length});
    if (live) expect_shape("live", live.shape(), indices.shape());
    expect_length("tokens", length);
    Tensor<bool, P, dynamic, dynamic> unrouted(policy, {indices.extent(0), length});
    unrouted_tokens_kernel(policy, unrouted.view(), indices.const_view(), mask, live);
    return unrouted;
}

/// What tokens get that were not chosen:  out[b, i] += null_token where unrouted[b, i]
///
///     out (b, n, d), null_token (d), unrouted (b, n)
template <Policy P, typename Scalar, Viewable Null>
void add_null_query(const P& policy, TokensView<Scalar> out, const Null& null_token, Mask unrouted) {
    static_assert(same_scalar<TokensView<Scalar>, Null>, "colt5: `null_token` must have the scalar type of `out`");
    expect_shape("null_token", null_token.shape(), {out.extent(2)});
    expect_shape("unrouted", unrouted.shape(), {out.extent(0), out.extent(1)});
    assign(policy, out, out + select(column(unrouted), row(null_token), accumulate_t<Scalar>(0)));
}

/// Vector-Jacobian product of add_null_query with respect to the null token:  d_null_token += Σ d_out[b, i] over
/// unrouted[b, i]. (With respect to `out` it is d_out itself.)
template <Policy P, Viewable D>
void null_query_vjp(const P& policy, VectorView<accumulate_t<typename D::value_type>> d_null_token, const D& d_out,
                    Mask unrouted) {
    expect_shape("d_null_token", d_null_token.shape(), {d_out.extent(2)});
    expect_shape("unrouted", unrouted.shape(), {d_out.extent(0), d_out.extent(1)});
    null_query_vjp_kernel(policy, d_null_token, TokensView<const typename D::value_type>(d_out.const_view()), unrouted);
}

}  // namespace colt5
