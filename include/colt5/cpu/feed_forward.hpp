// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cpu/gemm.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/partial_sums.hpp>
#include <colt5/cpu/rms_norm.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/feed_forward.hpp>

namespace colt5 {

namespace cpu {

/// y = x · Φ(x); y may be x
template <typename T>
void gelu_row(const T* x, Index count, T* y) {
    for_each_batch<T>(count, [&](Index j, Index width) { store(y + j, gelu(load(x + j, width)), width); });
}

/// y = x · Φ(x) and slope = Φ(x) + x φ(x)
template <typename T>
void gelu_row_with_slope(const T* x, Index count, T* y, T* slope) {
    for_each_batch<T>(count, [&](Index j, Index width) {
        const Batch<T> v = load(x + j, width);
        const NormalTail<T> tail(v);
        store(y + j, gelu(tail, v), width);
        store(slope + j, gelu_slope(tail, v), width);
    });
}

}  // namespace cpu

/// Each panel of rows goes through norm, linear, GELU and linear before the next panel begins. So the intermediate rows
/// of a panel stay in caches. Of them only `pre_activation` is stored, if it is given.
template <typename T>
void feed_forward_kernel(const Cpu& policy, TokensView<T> y, TokensView<T> pre_activation, TokensView<const T> x,
                         const FeedForwardParameters<const T>& parameters, TokensView<const T> add) {
    using cpu::Op;
    const Index length = x.extent(1), dim = x.extent(2), hidden = parameters.hidden_weight.extent(0);
    const Index tokens = x.extent(0) * length;
    const T *const hidden_weight = parameters.hidden_weight.data(), *const weight = parameters.project_weight.data();
    const cpu::PackedMatrix<Op::transpose, T> to_hidden(policy, dim, hidden, hidden_weight, dim, tokens);
    const cpu::PackedMatrix<Op::transpose, T> to_out(policy, hidden, dim, weight, hidden, tokens);
    const cpu::Addend<T> added{parameters.project_bias.data(), add.data(), dim};
    cpu::panels(x.extent(0), length).for_each(policy, [&](Index sequence, Index first, Index rows) {
        const Index row = sequence * length + first;
        T* const normed = cpu::thread_scratch<T, struct Normed>(rows * dim);
        T* const h = cpu::thread_scratch<T, struct Hidden>(rows * hidden);
        T* const h_pre_activation = pre_activation ? pre_activation.data() + row * hidden : h;
        cpu::normalize_rows(parameters.norm, x.data() + row * dim, rows, normed);
        to_hidden.multiply(rows, normed, dim, {parameters.hidden_bias.data()}, h_pre_activation, hidden);
        cpu::gelu_row(h_pre_activation, rows * hidden, h);
        to_out.multiply(rows, h, hidden, added.part(row, 0), y.data() + row * dim, dim);
    });
}

/// Block by block: first the gradients of the rows, panels in parallel, then those of the weights.
template <typename T>
void feed_forward_vjp_kernel(const Cpu& policy, TokensView<T> d_x, const FeedForwardParameters<T>& gradients,
                             TokensView<const T> d_y, TokensView<const T> x, TokensView<const T> pre_activation,
                             const FeedForwardParameters<const T>& parameters,
                             const GradientEpilogue<T, Cpu>& epilogue) {
    using cpu::Op;
    const Index length = x.extent(1), dim = x.extent(2), hidden = parameters.hidden_weight.extent(0);
    const Index tokens = x.extent(0) * length;
    const T *const hidden_weight = parameters.hidden_weight.data(), *const weight = parameters.project_weight.data();
    const cpu::PackedMatrix<Op::none, T> from_out(policy, dim, hidden, weight, hidden, tokens);
    const cpu::PackedMatrix<Op::none, T> from_hidden(policy, hidden, dim, hidden_weight, dim, tokens);
    cpu::PackedMatrix<Op::transpose, T> to_hidden;
    if (!pre_activation) to_hidden = {policy, dim, hidden, hidden_weight, dim, tokens};
    const auto add_block = [&](Index sequence, Index first, Index block) {
        const Index row = sequence * length + first;
        const T *const x_rows = x.data() + row * dim, *const d_y_rows = d_y.data() + row * dim;
        MatrixTensor<T, Cpu> normed(policy, {block, dim}), h(policy, {block, hidden}), d_h(policy, {block, hidden});
        const cpu::Panels panels = cpu::panels(1, block);
        cpu::PartialSums<T> norm_sums(policy, panels.count(), dim);
        cpu::PartialSums<T> d_project_bias(policy, panels.count(), dim), d_hidden_bias(policy, panels.count(), hidden);
        parallel_for(policy, panels.count(), [&](Index panel) {
            panels.visit(panel, [&](Index, Index at, Index rows) {
                T* const normed_rows = normed.data() + at * dim;
                T *const h_rows = h.data() + at * hidden, *const d_h_rows = d_h.data() + at * hidden;
                T* const slope = cpu::thread_scratch<T, struct Slope>(rows * hidden);
                cpu::normalize_rows(parameters.norm, x_rows + at * dim, rows, normed_rows);
                if (!pre_activation)
                    to_hidden.multiply(rows, normed_rows, dim, {parameters.hidden_bias.data()}, h_rows, hidden);
                cpu::gelu_row_with_slope(pre_activation ? pre_activation.data() + (row + at) * hidden : h_rows,
                                         rows * hidden, h_rows, slope);
                from_out.multiply(rows, d_y_rows + at * dim, dim, {}, d_h_rows, hidden);
                cpu::multiply_row(d_h_rows, slope, rows * hidden);

                T* const d_normed = cpu::thread_scratch<T, struct NormedGradient>(rows * dim);
                from_hidden.multiply(rows, d_h_rows, hidden, {}, d_normed, dim);
                cpu::normalize_rows_vjp(parameters.norm, d_x.data() + (row + at) * dim, norm_sums[panel], d_normed,
                                        x_rows + at * dim, rows, epilogue.d_residual_from((row + at) * dim));
                cpu::add_rows(d_y_rows + at * dim, rows, dim, d_project_bias[panel][0]);
                cpu::add_rows(d_h_rows, rows, hidden, d_hidden_bias[panel][0]);
            });
        });
        const cpu::PackedMatrix<Op::none, T> packed_h(policy, block, hidden, h.data(), hidden);
        cpu::add_weight_gradient(policy, gradients.project_weight.data(), dim, hidden, d_y_rows, packed_h);
        const cpu::PackedMatrix<Op::none, T> packed_normed(policy, block, dim, normed.data(), dim);
        cpu::add_weight_gradient(policy, gradients.hidden_weight.data(), hidden, dim, d_h.data(), packed_normed);
        norm_sums.add_to(gradients.norm.all());
        d_project_bias.add_to({gradients.project_bias});
        d_hidden_bias.add_to({gradients.hidden_bias});
    };
    const cpu::Panels blocks = cpu::backward_blocks(x.extent(0), length);
    for (Index i = 0; i < blocks.count(); ++i) blocks.visit(i, add_block);
}

}  // namespace colt5
