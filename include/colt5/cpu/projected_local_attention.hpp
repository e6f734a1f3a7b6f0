// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cpu/gemm.hpp>
#include <colt5/cpu/local_attention.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/op/projected_local_attention.hpp>

namespace colt5 {

/// The attention's probabilities are computed once, for its output and for its gradients.
template <typename T, typename Bias, typename DTable>
void projected_local_attention_vjp_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic> d_qkv,
                                          MatrixView<T> d_weight, TokensView<const T> d_y,
                                          View<const T, dynamic, dynamic, dynamic, dynamic> q,
                                          View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> kv, Mask mask,
                                          Index first, Index carried, const LocalAttention& attention,
                                          MatrixView<const T> weight, const Bias& bias, const DTable& d_table) {
    using cpu::Op;
    const auto [batch, queries, heads, dim_head] = q.shape();
    const Index inner = heads * dim_head, dim = d_y.extent(2), length = queries;
    LocalAttentionActivations<T, Cpu> saved{{policy, q.shape()}, {policy, {batch, heads, queries}}};
    auto d_out = tensor_like(policy, saved.out);
    const cpu::PackedMatrix<Op::none, T> packed(policy, dim, inner, weight.data(), inner, batch * length);
    cpu::panels(batch, length).for_each(policy, [&](Index sequence, Index begin, Index rows) {
        const Index row = sequence * length + begin;
        packed.multiply(rows, d_y.data() + row * dim, dim, {}, d_out.data() + row * inner, inner);
    });
    cpu::local_attention_gradients<T>(policy, d_qkv, d_out.const_view(), saved.out.const_view(),
                                      saved.log_sum_exp.const_view(), saved.out.view(), saved.log_sum_exp.view(), q, kv,
                                      mask, first, carried, attention, bias, d_table);
    const cpu::Panels blocks = cpu::backward_blocks(batch, length);
    const auto add_block = [&](Index sequence, Index begin, Index rows) {
        const Index row = sequence * length + begin;
        cpu::add_weight_gradient(
            policy, d_weight.data(), dim, inner, d_y.data() + row * dim,
            cpu::PackedMatrix<Op::none, T>(policy, rows, inner, saved.out.data() + row * inner, inner));
    };
    for (Index i = 0; i < blocks.count(); ++i) blocks.visit(i, add_block);
}

}  // namespace colt5
