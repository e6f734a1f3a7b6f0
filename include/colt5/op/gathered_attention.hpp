// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/op/dense_attention.hpp>

namespace colt5 {

template <typename P>
void gathered_attention_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `gathered_attention` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void gathered_attention_vjp_kernel(const P&, ...) {
    static_assert(
        has_kernel<P>,
        "colt5: no `gathered_attention_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

namespace detail {
template <typename Q, typename KV, typename Scale>
void check_gathered_attention(const Q& q, const KV& kv, TokensView<const TokenIndex> indices, KeyMask mask,
                              const Scale& value_scale) {
    static_assert(same_scalar<Q, KV>, "colt5: `kv` must have the scalar type of `q`");
    expect_shape("kv", kv.shape(), {dynamic, q.extent(2), 2, q.extent(3)});
    expect_shape("indices", indices.shape(), {q.extent(0), 1, dynamic});
    if (mask) expect_shape("mask", mask.shape(), indices.shape());
    if (value_scale) expect_shape("value_scale", value_scale.shape(), indices.shape());
    expect_length("q", q.extent(1));
    expect_length("kv", kv.extent(0));
    expect_length("indices", indices.extent(2));
}
}  // namespace detail

/// Dense attention to rows of one tensor that all batch entries share, each to those that its indices choose: what
/// dense_attention_forward gives for the keys and values kv[indices[b, 0, j]], which a GPU reads where they are.
///
///     q (b, n, h, dim_head), kv (N, h, 2, dim_head): keys and values, indices (b, 1, k), each in [0, N), mask and
///     value_scale (b, 1, k), each may be absent  →  out (b, n, h, dim_head)
///
/// Throws as dense_attention_forward does, and ValueError on the CPU when an index is out of its range.
template <Policy P, Viewable Q, Viewable KV>
auto gathered_attention_forward(const P& policy, const Q& q, const KV& kv, TokensView<const TokenIndex> indices,
                                KeyMask mask, TokensView<const accumulate_t<typename Q::value_type>> value_scale) {
    using Scalar = typename Q::value_type;
    detail::check_gathered_attention(q, kv, indices, mask, value_scale);
    DenseAttentionActivations<Scalar, P> saved{{policy, q.shape()}, {policy, {q.extent(0), q.extent(2), q.extent(1)}}};
    gathered_attention_kernel(policy, saved.out.view(), saved.log_sum_exp.view(), q.const_view(), kv.const_view(),
                              indices, mask, value_scale);
    return saved;
}

/// Vector-Jacobian product. d_kv (b, 1, k, h, 2, dim_head), other than kv, has a row for each index: gather_vjp sums
/// those of one row of kv. Throws as gathered_attention_forward does.
template <Policy P, typename Scalar, Viewable Out, Viewable Q, Viewable KV>
auto gathered_attention_vjp(const P& policy, const DenseAttentionActivations<Scalar, P>& saved, const Out& d_out,
                            const Q& q, const KV& kv, TokensView<const TokenIndex> indices, KeyMask mask,
                            TokensView<const accumulate_t<Scalar>> value_scale) {
    detail::check_gathered_attention(q, kv, indices, mask, value_scale);
    static_assert(same_scalar<decltype(saved.out), Out, Q>,
                  "colt5: `d_out` and `q` must have the scalar type of `saved`");
    expect_shape("q", q.shape(), saved.out.shape());
    expect_shape("saved.log_sum_exp", saved.log_sum_exp.shape(), {q.extent(0), q.extent(2), q.extent(1)});
    expect_shape("d_out", d_out.shape(), saved.out.shape());
    const std::array<Index, 6> shape{q.extent(0), 1, indices.extent(2), q.extent(2), 2, q.extent(3)};
    DenseAttentionGradients<Scalar, P> d{{policy, q.shape()}, {policy, shape}, {}};
    if (value_scale) d.d_value_scale = {policy, value_scale.shape()};
    gathered_attention_vjp_kernel(policy, d.d_q.view(), d.d_kv.view(), d.d_value_scale.view(), d_out.const_view(),
                                  saved.out.const_view(), saved.log_sum_exp.const_view(), q.const_view(),
                                  kv.const_view(), indices, mask, value_scale);
    return d;
}

}  // namespace colt5
