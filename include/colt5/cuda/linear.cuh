// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/column_sums.cuh>
#include <colt5/cuda/matmul.cuh>
#include <colt5/op/linear.hpp>

namespace colt5 {

template <typename T>
void linear_kernel(const Cuda& policy, View<T, dynamic, dynamic, dynamic, dynamic> y,
                   View<const T, dynamic, dynamic, dynamic, dynamic> x, MatrixView<const T> weight,
                   VectorView<const T> bias) {
    const Index batch = x.extent(0), routes = x.extent(1), length = x.extent(2), in = x.extent(3), out = y.extent(3);
    if (routes == 1) {  // all sequences are one matrix
        cuda::matmul<T>(policy, batch * length, out, in, {y.data(), out}, {x.data(), in}, {weight.data(), in, true},
                        bias.data());
        return;
    }
    for (Index r = 0; r < routes; ++r)
        cuda::matmul<T>(policy, length, out, in, {y.data() + r * length * out, out, false, routes * length * out},
                        {x.data() + r * length * in, in, false, routes * length * in},
                        {weight.data() + r * out * in, in, true}, bias ? bias.data() + r * out : nullptr, nullptr,
                        batch);
}

template <typename T>
void linear_add_kernel(const Cuda& policy, TokensView<T> y, TokensView<const T> x, MatrixView<const T> weight,
                       VectorView<const T> bias, TokensView<const T> add) {
    const Index rows = x.extent(0) * x.extent(1), in = x.extent(2), out = y.extent(2);
    cuda::matmul<T>(policy, rows, out, in, {y.data(), out}, {x.data(), in}, {weight.data(), in, true}, bias.data(),
                    add.data());
}

template <typename T>
void linear_vjp_kernel(const Cuda& policy, View<T, dynamic, dynamic, dynamic, dynamic> d_x,
                       MatrixView<accumulate_t<T>> d_weight, VectorView<accumulate_t<T>> d_bias,
                       View<const T, dynamic, dynamic, dynamic, dynamic> d_y,
                       View<const T, dynamic, dynamic, dynamic, dynamic> x, MatrixView<const T> weight) {
    const Index batch = x.extent(0), routes = x.extent(1), length = x.extent(2), in = x.extent(3), out = d_y.extent(3);
    const Index matrices = routes == 1 ? 1 : batch, rows = routes == 1 ? batch * length : length;
    for (Index r = 0; r < routes; ++r) {
        const T* const w = weight.data() + r * out * in;
        const Index d_y_first = r * length * out, x_first = r * length * in;
        const Index d_y_stride = routes * length * out, x_stride = routes * length * in;
        accumulate_t<T>* const d_w = d_weight.data() + r * out * in;
        for (Index b = 0; b < matrices; ++b)  // first: d_x may be x
            cuda::matmul<T, accumulate_t<T>>(policy, out, in, rows, {d_w, in},
                                             {d_y.data() + d_y_first + b * d_y_stride, out, true},
                                             {x.data() + x_first + b * x_stride, in}, nullptr, d_w);
        if (d_bias)
            cuda::add_column_sums(policy, d_bias.data() + r * out, batch * length,
                                  cuda::RouteRows<T>{d_y.data(), length, routes, r, out});
        cuda::matmul<T>(policy, rows, in, out, {d_x.data() + x_first, in, false, x_stride},
                        {d_y.data() + d_y_first, out, false, d_y_stride}, {w, in}, nullptr, nullptr, matrices);
    }
}

}  // namespace colt5
