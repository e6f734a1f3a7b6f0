// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/cuda/linear.cuh>
#include <colt5/cuda/local_attention.cuh>
#include <colt5/op/projected_local_attention.hpp>

namespace colt5 {

/// Attention is recomputed, then come the gradients of the projection and of attention.
template <typename T, typename Bias, typename DTable, Index head>
void projected_local_attention_vjp_kernel(const Cuda& policy,
                                          View<T, dynamic, dynamic, dynamic, dynamic, dynamic> d_qkv,
                                          MatrixView<accumulate_t<T>> d_weight, TokensView<const T> d_y,
                                          View<const T, dynamic, dynamic, dynamic, head> q,
                                          View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> kv, Mask mask,
                                          Index first, Index carried, const LocalAttention& attention,
                                          MatrixView<const T> weight, const Bias& bias, const DTable& d_table) {
    const auto [batch, queries, heads, dim_head] = q.shape();
    const auto saved = local_attention_forward(policy, attention, q, kv, mask, first, bias);
    const auto out = saved.out.view().reshape(std::array{batch, queries, heads * dim_head});
    const auto d_out = linear_vjp(policy, d_y, out, weight, d_weight);
    local_attention_vjp(policy, d_qkv, attention, saved, d_out.view().reshape(q.shape()), q, kv, mask, first, carried,
                        bias, d_table);
}

}  // namespace colt5
