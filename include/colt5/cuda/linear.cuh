// SPDX-License-Identifier: MIT
#pragma once

#include <type_traits>

#include <colt5/cuda/column_sums.cuh>
#include <colt5/cuda/matmul.cuh>
#include <colt5/op/linear.hpp>

namespace colt5 {

namespace cuda {

inline constexpr int transpose_tile = 32, transpose_rows = 8;

/// to (columns, rows) = fromᵀ, by square tiles through shared memory.
template <typename T>
__global__ void transpose(T* to, const T* from, Index rows, Index columns) {
    __shared__ T tile[transpose_tile][transpose_tile + 1];
    const int x = static_cast<int>(threadIdx.x) % transpose_tile, y = static_cast<int>(threadIdx.x) / transpose_tile;
    const RowBlock at(divide_up(columns, transpose_tile));
    const Index column = static_cast<Index>(at.block) * transpose_tile,
                row = static_cast<Index>(at.row) * transpose_tile;
    for (int i = y; i < transpose_tile; i += transpose_rows)
        if (row + i < rows && column + x < columns) tile[i][x] = from[(row + i) * columns + column + x];
    __syncthreads();
    for (int i = y; i < transpose_tile; i += transpose_rows)
        if (column + i < columns && row + x < rows) to[(column + i) * rows + row + x] = tile[x][i];
}

/// d_x = d_y · weight, weight (out, in), for each matrix of a batch.
///
/// Tensor cores read floats only from rows along the inner dimension. For a weight in the other orientation, cuBLASLt
/// takes one and a half times as long as for a transposed copy, so the weight is transposed first.
template <typename T>
void linear_input_gradient(const Cuda& policy, Index rows, Index in, Index out, const Operand<T>& d_x,
                           const Operand<const T>& d_y, const T* weight, Index batch = 1) {
    if (!std::is_same_v<T, float> || policy.math() != MathMode::tf32)
        return matmul<T>(policy, rows, in, out, d_x, d_y, {weight, in}, nullptr, nullptr, batch);
    MatrixTensor<T, Cuda> transposed(policy, {in, out});
    launch(policy, "transpose", transpose<T>,
           grid_of_rows(divide_up(out, transpose_tile), divide_up(in, transpose_tile)), transpose_tile * transpose_rows,
           0, transposed.data(), weight, out, in);
    matmul<T>(policy, rows, in, out, d_x, d_y, {transposed.data(), out, true}, nullptr, nullptr, batch);
}

/// d_weight += d_yᵀ · x
template <typename T>
void add_weight_gradient(const Cuda& policy, Index rows, Index in, Index out, accumulate_t<T>* d_weight, const T* d_y,
                         const T* x) {
    if (rows == 0) return;
    matmul<T, accumulate_t<T>>(policy, out, in, rows, {d_weight, in}, {d_y, out, true}, {x, in}, nullptr, d_weight, 1,
                               Sums::shared);
}

}  // namespace cuda

template <typename Y, typename T>
void linear_kernel(const Cuda& policy, View<Y, dynamic, dynamic, dynamic, dynamic> y,
                   View<const T, dynamic, dynamic, dynamic, dynamic> x, MatrixView<const T> weight,
                   VectorView<const T> bias) {
    const Index batch = x.extent(0), routes = x.extent(1), length = x.extent(2), in = x.extent(3), out = y.extent(3);
    for (Index r = 0; r < routes; ++r)
        cuda::matmul<T, Y>(policy, length, out, in, {y.data() + r * length * out, out, false, routes * length * out},
                           {x.data() + r * length * in, in, false, routes * length * in},
                           {weight.data() + r * out * in, in, true}, bias ? bias.data() + r * out : nullptr, nullptr,
                           batch);
}

template <typename T>
void linear_add_kernel(const Cuda& policy, TokensView<T> y, TokensView<const T> x, MatrixView<const T> weight,
                       VectorView<const T> bias, TokensView<const T> add) {
    const Index batch = x.extent(0), length = x.extent(1), in = x.extent(2), out = y.extent(2);
    cuda::matmul<T>(policy, length, out, in, cuda::token_matrices(y.data(), length, out),
                    cuda::token_matrices(x.data(), length, in), {weight.data(), in, true}, bias.data(), add.data(),
                    batch);
}

template <typename T>
void linear_vjp_kernel(const Cuda& policy, View<T, dynamic, dynamic, dynamic, dynamic> d_x,
                       MatrixView<accumulate_t<T>> d_weight, VectorView<accumulate_t<T>> d_bias,
                       View<const T, dynamic, dynamic, dynamic, dynamic> d_y,
                       View<const T, dynamic, dynamic, dynamic, dynamic> x, MatrixView<const T> weight) {
    const Index batch = x.extent(0), routes = x.extent(1), length = x.extent(2), in = x.extent(3), out = d_y.extent(3);
    const Index products = routes == 1 ? 1 : batch, rows = routes == 1 ? batch * length : length;  // d_weight's
    for (Index r = 0; r < routes; ++r) {
        const T* const w = weight.data() + r * out * in;
        const Index d_y_first = r * length * out, x_first = r * length * in;
        const Index d_y_stride = routes * length * out, x_stride = routes * length * in;
        for (Index b = 0; b < products; ++b)  // first: d_x may be x
            cuda::add_weight_gradient(policy, rows, in, out, d_weight.data() + r * out * in,
                                      d_y.data() + d_y_first + b * d_y_stride, x.data() + x_first + b * x_stride);
        if (d_bias)
            cuda::add_column_sums(policy, d_bias.data() + r * out, batch * length,
                                  cuda::RouteRows<T>{d_y.data(), length, routes, r, out});
        cuda::linear_input_gradient<T>(policy, length, in, out, {d_x.data() + x_first, in, false, x_stride},
                                       {d_y.data() + d_y_first, out, false, d_y_stride}, w, batch);
    }
}

}  // namespace colt5
