// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/op/local_attention.hpp>

namespace colt5 {

template <typename P>
void projected_local_attention_vjp_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `projected_local_attention_vjp` kernel for this policy: include <colt5/cpu.hpp> or "
                  "<colt5/cuda.cuh>");
}

/// Vector-Jacobian product of  y = local_attention(q, kv) · weightᵀ  from the inputs alone: attention is
/// recomputed.
///
///     d_y (b, m, out), weight (out, h · dim_head); everything else as for local_attention_vjp
/// The gradients of queries, keys and values go to d_qkv; d_weight and d_table accumulate.
template <Policy P, Viewable DQKV, Viewable Y, Viewable Q, Viewable KV, Viewable W, typename Bias = NoBias,
          typename DTable = NoBias>
void projected_local_attention_vjp(const P& policy, const DQKV& d_qkv, const LocalAttention& attention, const Y& d_y,
                                   const Q& q, const KV& kv, Mask mask, Index first, Index carried, const W& weight,
                                   MatrixView<accumulate_t<typename Q::value_type>> d_weight, const Bias& bias = {},
                                   const DTable& d_table = {}) {
    static_assert(is_output<DQKV>, "colt5: `d_qkv` must be a view to write to, such as tensor.view()");
    static_assert(same_scalar<Q, DQKV, Y, W>, "colt5: `d_qkv`, `d_y` and `weight` must have the scalar type of `q`");
    detail::check_local_attention(attention, q, kv, mask, first);
    const auto [batch, queries, heads, dim_head] = q.shape();
    expect_shape("weight", weight.shape(), {dynamic, heads * dim_head});
    expect_shape("d_weight", d_weight.shape(), weight.shape());
    expect_shape("d_y", d_y.shape(), {batch, queries, weight.extent(0)});
    detail::check_local_gradient(attention, d_qkv, q, kv, first, carried);
    detail::check_bias(bias, heads);
    detail::check_bias_gradient(bias, d_table);
    projected_local_attention_vjp_kernel(policy, d_qkv.view(), d_weight, d_y.const_view(), heads_of_kernel<P>(q),
                                         kv.const_view(), mask, first, carried, attention, weight.const_view(), bias,
                                         d_table);
}

}  // namespace colt5
