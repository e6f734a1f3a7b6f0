// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cpu/gemm.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/scratch.hpp>
#include <colt5/op/linear.hpp>

namespace colt5 {

namespace cpu {

/// Rows of one task: large enough to repay packing the weights, small enough to share out short sequences. Depends on
/// the length of one sequence alone, so that a sequence gives the same bits in any batch and with any number of
/// threads.
inline Index panel_rows(Index length) {
    constexpr Index unit = 64, largest = 1024;
    return std::clamp((length / 4 + unit - 1) / unit * unit, unit, largest);
}

inline Index divide_up(Index a, Index b) {
    return (a + b - 1) / b;
}

/// d_weight (out, in) += Σ over sequences of dyᵀ · x, and d_bias (out) += Σ dy: tasks are blocks of rows of the result.
template <typename T>
void accumulate_weight_gradient(const Cpu& policy, MatrixView<T> d_weight, VectorView<T> d_bias,
                                View<const T, dynamic, dynamic, dynamic, dynamic> d_y,
                                View<const T, dynamic, dynamic, dynamic, dynamic> x) {
    const Index batch = x.extent(0), routes = x.extent(1), length = x.extent(2), in = x.extent(3);
    const Index out = d_y.extent(3), block = out >= 1024 ? 256 : 64, blocks = divide_up(out, block);
    parallel_for(policy, routes * blocks, [&](Index task) {
        const Index r = task / blocks, first = task % blocks * block, count = std::min(block, out - first);
        for (Index b = 0; b < batch; ++b) {
            const T* const d_y_panel = d_y[b][r].data() + first;
            gemm<Op::transpose, Op::none>(count, in, length, T(1), d_y_panel, out, x[b][r].data(), in,
                                          d_weight[r * out + first].data(), in);
            if (!d_bias) continue;
            constexpr Index chunk = 256;  // partial sums keep rounding small over long sequences
            T* const sum = thread_scratch<T, struct BiasSums>(block);
            for (Index row = 0; row < length; row += chunk) {
                std::fill_n(sum, count, T(0));
                for (Index i = row; i < std::min(length, row + chunk); ++i)
                    for (Index j = 0; j < count; ++j) sum[j] += d_y_panel[i * out + j];
                for (Index j = 0; j < count; ++j) d_bias(r * out + first + j) += sum[j];
            }
        }
    });
}

}  // namespace cpu

template <typename T>
void linear_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> y,
                   View<const T, dynamic, dynamic, dynamic, dynamic> x, MatrixView<const T> weight,
                   VectorView<const T> bias) {
    const Index batch = x.extent(0), routes = x.extent(1), length = x.extent(2), in = x.extent(3);
    const Index out = y.extent(3), panel = cpu::panel_rows(length), panels = cpu::divide_up(length, panel);
    parallel_for(policy, batch * routes * panels, [&](Index task) {
        const Index r = task / panels % routes, first = task % panels * panel, count = std::min(panel, length - first);
        const Index sequence = task / panels;  // b · routes + r
        T* const y_panel = y.data() + (sequence * length + first) * out;
        for (Index i = 0; i < count; ++i) {
            if (bias)
                std::copy_n(bias.data() + r * out, out, y_panel + i * out);
            else
                std::fill_n(y_panel + i * out, out, T(0));
        }
        cpu::gemm<cpu::Op::none, cpu::Op::transpose>(count, out, in, T(1), x.data() + (sequence * length + first) * in,
                                                     in, weight[r * out].data(), in, y_panel, out);
    });
}

template <typename T>
void linear_vjp_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> d_x, MatrixView<T> d_weight,
                       VectorView<T> d_bias, View<const T, dynamic, dynamic, dynamic, dynamic> d_y,
                       View<const T, dynamic, dynamic, dynamic, dynamic> x, MatrixView<const T> weight) {
    const Index batch = x.extent(0), routes = x.extent(1), length = x.extent(2), in = x.extent(3);
    const Index out = d_y.extent(3), panel = cpu::panel_rows(length), panels = cpu::divide_up(length, panel);
    parallel_for(policy, batch * routes * panels, [&](Index task) {
        const Index sequence = task / panels, r = sequence % routes;
        const Index first = task % panels * panel, count = std::min(panel, length - first);
        T* const d_x_panel = d_x.data() + (sequence * length + first) * in;
        std::fill_n(d_x_panel, count * in, T(0));
        cpu::gemm<cpu::Op::none, cpu::Op::none>(count, in, out, T(1), d_y.data() + (sequence * length + first) * out,
                                                out, weight[r * out].data(), in, d_x_panel, in);
    });
    cpu::accumulate_weight_gradient(policy, d_weight, d_bias, d_y, x);
}

}  // namespace colt5
