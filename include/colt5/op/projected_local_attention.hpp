// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/op/linear.hpp>
#include <colt5/op/local_attention.hpp>

namespace colt5 {

namespace detail {
/// (b, n, h, dim_head) → (b, n, h · dim_head)
template <Viewable T>
auto merge_heads(const T& x) {
    return x.view().reshape(std::array{x.extent(0), x.extent(1), x.extent(2) * x.extent(3)});
}
}  // namespace detail

/// For any policy: one step after the other. A policy that can use the attention's forward pass in its backward pass
/// overloads this.
template <Policy P, typename T>
void projected_local_attention_vjp_kernel(const P& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic> d_qkv,
                                          MatrixView<accumulate_t<T>> d_weight, TokensView<const T> d_y,
                                          View<const T, dynamic, dynamic, dynamic, dynamic> q,
                                          View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> kv, Mask mask,
                                          Index first, const LocalAttention& attention, MatrixView<const T> weight) {
    const auto pass = local_attention_forward(policy, attention, q, kv, mask, first);
    const auto d_out = linear_vjp(policy, d_y, detail::merge_heads(pass.out), weight, d_weight);
    local_attention_vjp(policy, d_qkv, attention, pass, d_out.view().reshape(q.shape()), q, kv, mask, first);
}

/// Vector-Jacobian product of  y = local_attention(q, kv) · weightᵀ  from the inputs alone: attention is computed
/// again.
///
///     d_y (b, m, out), weight (out, h · dim_head); everything else as for local_attention_vjp
/// The gradients of queries, keys and values go to d_qkv; d_weight grows.
template <Policy P, Viewable DQKV, Viewable Y, Viewable Q, Viewable KV, Viewable W>
void projected_local_attention_vjp(const P& policy, const DQKV& d_qkv, const LocalAttention& attention, const Y& d_y,
                                   const Q& q, const KV& kv, Mask mask, Index first, const W& weight,
                                   MatrixView<accumulate_t<typename Q::value_type>> d_weight) {
    detail::check_local_attention(attention, q, kv, mask, first);
    const auto [batch, queries, heads, dim_head] = q.shape();
    expect_shape("weight", weight.shape(), {dynamic, heads * dim_head});
    expect_shape("d_weight", d_weight.shape(), weight.shape());
    expect_shape("d_y", d_y.shape(), {batch, queries, weight.extent(0)});
    expect_shape("d_qkv", d_qkv.shape(), {batch, attention.window(first, queries, kv.extent(1)), 3, heads, dim_head});
    projected_local_attention_vjp_kernel(policy, d_qkv.view(), d_weight, d_y.const_view(), q.const_view(),
                                         kv.const_view(), mask, first, attention, weight.const_view());
}

}  // namespace colt5
