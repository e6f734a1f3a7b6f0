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

/// Calls body(sequence, first, rows) for panels of the rows of every sequence, in parallel.
template <typename Body>
void for_each_panel(const Cpu& policy, Index batch, Index length, Body&& body) {
    const Index panel = panel_rows(length), panels = divide_up(length, panel);
    parallel_for(policy, batch * panels, [&](Index task) {
        const Index first = task % panels * panel;
        body(task / panels, first, std::min(panel, length - first));
    });
}

/// sum += Σ of the rows of a panel, in partial sums that keep rounding small
template <typename T>
void add_rows(const T* rows, Index count, Index columns, T* sum) {
    constexpr Index chunk = 256;
    T* const part = thread_scratch<T, struct BiasSums>(columns);
    for (Index first = 0; first < count; first += chunk) {
        std::fill_n(part, columns, T(0));
        for (Index i = first; i < std::min(count, first + chunk); ++i)
            for (Index j = 0; j < columns; ++j) part[j] += rows[i * columns + j];
        for (Index j = 0; j < columns; ++j) sum[j] += part[j];
    }
}

/// d_weight (out, in) += Σ over tokens of dyᵀ · x, and d_bias (out) += Σ dy.
///
/// Lanes of consecutive tokens have sums of their own, which are added up in order: each token is read once, and the
/// number of lanes depends on the number of tokens alone.
template <typename T>
void accumulate_weight_gradient(const Cpu& policy, MatrixView<T> d_weight, VectorView<T> d_bias,
                                View<const T, dynamic, dynamic, dynamic, dynamic> d_y,
                                View<const T, dynamic, dynamic, dynamic, dynamic> x) {
    const Index batch = x.extent(0), routes = x.extent(1), length = x.extent(2), in = x.extent(3), out = d_y.extent(3);
    constexpr Index most_lanes = 16, least_tokens = 128;
    const Index panel = panel_rows(length), panels = divide_up(length, panel);
    const Index lanes_of_tokens = std::clamp(batch * length / least_tokens, Index{1}, most_lanes);
    const Index lanes_of_route = std::min(lanes_of_tokens, batch * panels);
    TokensTensor<T, Cpu> weight_sums(policy, {routes * lanes_of_route, out, in});
    MatrixTensor<T, Cpu> bias_sums(policy, {routes * lanes_of_route, d_bias ? out : 0});
    parallel_for(policy, routes * lanes_of_route, [&](Index lane) {
        const Index r = lane / lanes_of_route, i = lane % lanes_of_route;
        T* const weight_sum = weight_sums.view()[lane].data();
        std::fill_n(weight_sum, out * in, T(0));
        if (d_bias) std::fill_n(bias_sums.view()[lane].data(), out, T(0));
        const Index last = batch * panels * (i + 1) / lanes_of_route;
        for (Index p = batch * panels * i / lanes_of_route; p < last; ++p) {
            const Index b = p / panels, first = p % panels * panel, count = std::min(panel, length - first);
            const T* const d_y_panel = d_y[b][r].data() + first * out;
            gemm<Op::transpose, Op::none>(out, in, count, T(1), d_y_panel, out, x[b][r].data() + first * in, in,
                                          weight_sum, in);
            if (d_bias) add_rows(d_y_panel, count, out, bias_sums.view()[lane].data());
        }
    });
    // Every row of the gradient, in parallel, from the lanes in order.
    parallel_for(policy, routes * out, [&](Index row) {
        for (Index i = 0; i < lanes_of_route; ++i) {
            const Index lane = row / out * lanes_of_route + i;
            const T* const sum = weight_sums.view()[lane][row % out].data();
            T* const to = d_weight[row].data();
            for (Index j = 0; j < in; ++j) to[j] += sum[j];
            if (d_bias) d_bias(row) += bias_sums.view()(lane, row % out);
        }
    });
}

}  // namespace cpu

template <typename T>
void linear_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> y,
                   View<const T, dynamic, dynamic, dynamic, dynamic> x, MatrixView<const T> weight,
                   VectorView<const T> bias) {
    const Index routes = x.extent(1), in = x.extent(3), out = y.extent(3);
    for (Index r = 0; r < routes; ++r) {
        const cpu::PackedMatrix<cpu::Op::transpose, T> packed(policy, in, out, weight[r * out].data(), in);
        const cpu::Addend<T> add{bias ? bias.data() + r * out : nullptr};
        cpu::for_each_panel(policy, x.extent(0), x.extent(2), [&](Index b, Index first, Index rows) {
            packed.multiply(rows, x[b][r][first].data(), in, add, y[b][r][first].data(), out);
        });
    }
}

template <typename T>
void linear_vjp_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> d_x, MatrixView<T> d_weight,
                       VectorView<T> d_bias, View<const T, dynamic, dynamic, dynamic, dynamic> d_y,
                       View<const T, dynamic, dynamic, dynamic, dynamic> x, MatrixView<const T> weight) {
    const Index routes = x.extent(1), in = x.extent(3), out = d_y.extent(3);
    cpu::accumulate_weight_gradient(policy, d_weight, d_bias, d_y, x);  // first: d_x may be x
    for (Index r = 0; r < routes; ++r) {
        const cpu::PackedMatrix<cpu::Op::none, T> packed(policy, out, in, weight[r * out].data(), in);
        cpu::for_each_panel(policy, x.extent(0), x.extent(2), [&](Index b, Index first, Index rows) {
            packed.multiply(rows, d_y[b][r][first].data(), out, {}, d_x[b][r][first].data(), in);
        });
    }
}

}  // namespace colt5
