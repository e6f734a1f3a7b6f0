// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cpu/gemm.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/partial_sums.hpp>
#include <colt5/op/linear.hpp>

namespace colt5 {

namespace cpu {
/// For PackedMatrix: how many rows of a route of (b, r, n, ·) will be multiplied in all, where they lie together. With
/// several sequences and several routes they do not: then `many_rows`, so that the weights are packed once and not for
/// each sequence.
template <typename T>
Index rows_together(const View<const T, dynamic, dynamic, dynamic, dynamic>& x) {
    return x.extent(0) == 1 || x.extent(1) == 1 ? x.extent(0) * x.extent(2) : many_rows;
}

template <typename T>
void linear(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> y,
            View<const T, dynamic, dynamic, dynamic, dynamic> x, MatrixView<const T> weight, VectorView<const T> bias,
            const T* add) {
    const Index routes = x.extent(1), length = x.extent(2), in = x.extent(3), out = y.extent(3);
    const cpu::Panels panels = cpu::panels(x.extent(0), length, routes == 1);
    const Index together = cpu::rows_together(x);
    for (Index r = 0; r < routes; ++r) {
        const cpu::PackedMatrix<cpu::Op::transpose, T> packed(policy, in, out, weight[r * out].data(), in, together);
        const cpu::Addend<T> added{bias ? bias.data() + r * out : nullptr, add, out};
        panels.for_each(policy, [&](Index sequence, Index first, Index rows) {
            const Index row = (sequence * routes + r) * length + first;
            packed.multiply(rows, x.data() + row * in, in, added.part(row, 0), y.data() + row * out, out);
        });
    }
}
}  // namespace cpu

template <typename T>
void linear_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> y,
                   View<const T, dynamic, dynamic, dynamic, dynamic> x, MatrixView<const T> weight,
                   VectorView<const T> bias) {
    cpu::linear<T>(policy, y, x, weight, bias, nullptr);
}

template <typename T>
void linear_add_kernel(const Cpu& policy, TokensView<T> y, TokensView<const T> x, MatrixView<const T> weight,
                       VectorView<const T> bias, TokensView<const T> add) {
    cpu::linear<T>(policy, detail::one_route(y), detail::one_route(x), weight, bias, add.data());
}

template <typename T>
void linear_vjp_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> d_x, MatrixView<T> d_weight,
                       VectorView<T> d_bias, View<const T, dynamic, dynamic, dynamic, dynamic> d_y,
                       View<const T, dynamic, dynamic, dynamic, dynamic> x, MatrixView<const T> weight) {
    using cpu::Op;
    const Index routes = x.extent(1), length = x.extent(2), in = x.extent(3), out = d_y.extent(3);
    const cpu::Panels blocks = cpu::backward_blocks(x.extent(0), length, routes == 1);
    const Index together = cpu::rows_together(x);
    for (Index r = 0; r < routes; ++r) {
        const cpu::PackedMatrix<Op::none, T> packed(policy, out, in, weight[r * out].data(), in, together);
        const auto add_block = [&](Index sequence, Index first, Index block) {
            const Index row = (sequence * routes + r) * length + first;
            const T* const d_y_rows = d_y.data() + row * out;
            T* const d_x_rows = d_x.data() + row * in;
            // Packed now, because d_x may be x. With a BLAS nothing is copied: then the gradient of the weight must
            // come before d_x is written.
            const cpu::PackedMatrix<Op::none, T> packed_x(policy, block, in, x.data() + row * in, in);
            const auto add_weight_gradient = [&] {
                cpu::add_weight_gradient(policy, d_weight[r * out].data(), out, in, d_y_rows, packed_x);
            };
            if (cpu::uses_blas) add_weight_gradient();
            const cpu::Panels panels = cpu::panels(1, block);
            cpu::PartialSums<T> bias_sums(policy, panels.count(), d_bias ? out : 0);
            parallel_for(policy, panels.count(), [&](Index panel) {
                panels.visit(panel, [&](Index, Index at, Index rows) {
                    packed.multiply(rows, d_y_rows + at * out, out, {}, d_x_rows + at * in, in);
                    if (d_bias) cpu::add_rows(d_y_rows + at * out, rows, out, bias_sums[panel][0]);
                });
            });
            if (!cpu::uses_blas) add_weight_gradient();  // d_y is in the cache now
            bias_sums.add_to({d_bias.range(r * out, d_bias ? out : 0)});
        };
        for (Index i = 0; i < blocks.count(); ++i) blocks.visit(i, add_block);
    }
}

}  // namespace colt5
