// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/cpu/gemm.hpp>
#include <colt5/cpu/layer_norm.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/partial_sums.hpp>
#include <colt5/cpu/rms_norm.hpp>
#include <colt5/op/norm_linear.hpp>

namespace colt5 {

/// The normalized rows of a panel stay in the cache, and nowhere else.
template <typename T, std::size_t Count, typename Norm>
void norm_linear_kernel(const Cpu& policy, const std::array<Projection<T>, Count>& projections, TokensView<const T> x,
                        const Norm& norm) {
    const Index length = x.extent(1), in = x.extent(2);
    std::array<cpu::PackedMatrix<cpu::Op::transpose, T>, Count> packed;
    for (std::size_t i = 0; i < Count; ++i)
        packed[i] = {
            policy, in, projections[i].weight.extent(0), projections[i].weight.data(), in, x.extent(0) * length};
    cpu::panels(x.extent(0), length).for_each(policy, [&](Index sequence, Index first, Index rows) {
        const Index row = sequence * length + first;
        T* const normed = cpu::thread_scratch<T, struct Normed>(rows * in);
        cpu::normalize_rows(norm, x.data() + row * in, rows, normed);
        for (std::size_t i = 0; i < Count; ++i) {
            const Index out = projections[i].weight.extent(0);
            packed[i].multiply(rows, normed, in, {projections[i].bias.data()}, projections[i].y.data() + row * out,
                               out);
        }
    });
}

/// Normalized rows are recomputed, which costs less than to have saved them.
template <typename T, typename Norm, typename NormGradients>
void norm_linear_vjp_kernel(const Cpu& policy, TokensView<T> d_x, const NormGradients& d_norm, MatrixView<T> d_weight,
                            VectorView<T> d_bias, TokensView<const T> d_y, TokensView<const T> x, const Norm& norm,
                            MatrixView<const T> weight, const GradientEpilogue<T, Cpu>& epilogue) {
    const Index length = x.extent(1), in = x.extent(2), out = d_y.extent(2);
    const cpu::PackedMatrix<cpu::Op::none, T> packed(policy, out, in, weight.data(), in, x.extent(0) * length);
    const auto add_block = [&](Index sequence, Index first, Index block) {
        const Index row = sequence * length + first;
        const T *const x_rows = x.data() + row * in, *const d_y_rows = d_y.data() + row * out;
        MatrixTensor<T, Cpu> normed(policy, {block, in});
        const cpu::Panels panels = cpu::panels(1, block);
        cpu::PartialSums<T, Norm::count> norm_sums(policy, panels.count(), in);
        cpu::PartialSums<T> bias_sums(policy, panels.count(), d_bias ? out : 0);
        parallel_for(policy, panels.count(), [&](Index panel) {
            panels.visit(panel, [&](Index, Index at, Index rows) {
                cpu::normalize_rows(norm, x_rows + at * in, rows, normed.data() + at * in);
                T* const d_normed = cpu::thread_scratch<T, struct NormedGradient>(rows * in);
                packed.multiply(rows, d_y_rows + at * out, out, {}, d_normed, in);
                cpu::normalize_rows_vjp(norm, d_x.data() + (row + at) * in, norm_sums[panel], d_normed,
                                        x_rows + at * in, rows, epilogue.d_residual_from((row + at) * in));
                if (d_bias) cpu::add_rows(d_y_rows + at * out, rows, out, bias_sums[panel][0]);
            });
        });
        const cpu::PackedMatrix<cpu::Op::none, T> packed_normed(policy, block, in, normed.data(), in);
        cpu::add_weight_gradient(policy, d_weight.data(), out, in, d_y_rows, packed_normed);
        norm_sums.add_to(d_norm.all());
        bias_sums.add_to({d_bias});
    };
    const cpu::Panels blocks = cpu::backward_blocks(x.extent(0), length);
    for (Index i = 0; i < blocks.count(); ++i) blocks.visit(i, add_block);
}

}  // namespace colt5
