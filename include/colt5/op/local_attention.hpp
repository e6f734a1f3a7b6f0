// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/core/tensor.hpp>

namespace colt5 {

template <typename P>
void local_attention_kernel(const P&, ...) {
    static_assert(
        has_kernel<P>,
        "colt5: no `local_attention` kernel for this policy; for Cuda include <colt5/cuda.cuh> and compile with nvcc");
}
template <typename P>
void local_attention_vjp_kernel(const P&, ...) {
    static_assert(
        has_kernel<P>,
        "colt5: no `local_attention_vjp` kernel for this policy; for Cuda include <colt5/cuda.cuh> and compile "
        "with nvcc");
}

/// What a query gets whose window holds no real token.
enum class MaskedRows {
    zero,         ///< zeros, and no gradient
    window_mean,  ///< what local-attention 1.8.6 computes: the mean over the values of the three windows of reach
                  ///< tokens around it, where padding up to a multiple of reach counts as 0 and whole windows beyond it
                  ///< as −1. Meaningless; there to reproduce the reference's numbers in padded rows
};

/// Each token attends to the real tokens at distance `reach` or less:
///
///     out[i] = Σ_j softmax_j(q[i]·k[j] / √dim_head) v[j]   over |i − j| ≤ reach, mask[j]
///
///     qkv (b, n, 3, h, dim_head): queries, keys and values;  mask (b, n) or absent  →  out (b, n, h, dim_head)
///
/// Nothing of size n × reach is stored.
struct LocalAttention {
    Index reach;  ///< tokens to either side; the reference's light_window_size / 2
    MaskedRows masked_rows = MaskedRows::zero;
};

/// What the vector-Jacobian product reads: the output, and one log-sum-exp a row and head (−∞ where no key is visible).
template <typename Scalar, Policy P>
struct LocalAttentionPass {
    Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic> out;               // (b, n, h, dim_head)
    Tensor<accumulate_t<Scalar>, P, dynamic, dynamic, dynamic> log_sum_exp;  // (b, h, n)
};

namespace detail {
template <typename QKV>
void check_local_attention(const LocalAttention& attention, const QKV& qkv, Mask mask) {
    expect_shape("qkv", qkv.shape(), {dynamic, dynamic, 3, dynamic, dynamic});
    expect_value(attention.reach >= 1, "reach", ">= 1", attention.reach);
    if (mask) expect_shape("mask", mask.shape(), {qkv.extent(0), qkv.extent(1)});
}
}  // namespace detail

/// Forward that keeps what backward reads.
template <Policy P, Viewable QKV>
auto local_attention_forward(const P& policy, const LocalAttention& attention, const QKV& qkv, Mask mask) {
    using Scalar = typename QKV::value_type;
    detail::check_local_attention(attention, qkv, mask);
    const auto [batch, length, three, heads, dim_head] = qkv.shape();
    LocalAttentionPass<Scalar, P> pass{{policy, {batch, length, heads, dim_head}}, {policy, {batch, heads, length}}};
    local_attention_kernel(policy, pass.out.view(), pass.log_sum_exp.view(), qkv.const_view(), mask, attention);
    return pass;
}

/// Forward alone.
template <Policy P, Viewable QKV>
auto local_attention(const P& policy, const LocalAttention& attention, const QKV& qkv, Mask mask) {
    using Scalar = typename QKV::value_type;
    detail::check_local_attention(attention, qkv, mask);
    const auto [batch, length, three, heads, dim_head] = qkv.shape();
    Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic> out(policy, {batch, length, heads, dim_head});
    local_attention_kernel(policy, out.view(), TokensView<accumulate_t<Scalar>>{}, qkv.const_view(), mask, attention);
    return out;
}

/// Vector-Jacobian product from the output and the log-sum-exp of the pass: the probabilities p are computed again from
/// q, k and the log-sum-exp. With D = out·d_out:
///
///     dv[j] = Σ_i p_ij d_out[i],   ds_ij = p_ij (d_out[i]·v[j] − D_i) / √dim_head
///     dq[i] = Σ_j ds_ij k[j],      dk[j] = Σ_i ds_ij q[i]
///
/// Returns d_qkv (b, n, 3, h, dim_head).
template <Policy P, Viewable Out, Viewable L, Viewable D, Viewable QKV>
auto local_attention_vjp(const P& policy, const LocalAttention& attention, const Out& out, const L& log_sum_exp,
                         const D& d_out, const QKV& qkv, Mask mask) {
    detail::check_local_attention(attention, qkv, mask);
    const auto [batch, length, heads, dim_head] = out.shape();
    expect_shape("qkv", qkv.shape(), {batch, length, 3, heads, dim_head});
    expect_shape("d_out", d_out.shape(), out.shape());
    expect_shape("log_sum_exp", log_sum_exp.shape(), {batch, heads, length});
    Tensor<typename QKV::value_type, P, dynamic, dynamic, dynamic, dynamic, dynamic> d_qkv(policy, qkv.shape());
    local_attention_vjp_kernel(policy, d_qkv.view(), d_out.const_view(), out.const_view(), log_sum_exp.const_view(),
                               qkv.const_view(), mask, attention);
    return d_qkv;
}

template <Policy P, typename Scalar, Viewable D, Viewable QKV>
auto local_attention_vjp(const P& policy, const LocalAttention& attention, const LocalAttentionPass<Scalar, P>& pass,
                         const D& d_out, const QKV& qkv, Mask mask) {
    return local_attention_vjp(policy, attention, pass.out, pass.log_sum_exp, d_out, qkv, mask);
}

}  // namespace colt5
