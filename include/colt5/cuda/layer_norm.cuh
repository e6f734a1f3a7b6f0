// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/column_sums.cuh>
#include <colt5/cuda/launch.cuh>
#include <colt5/op/layer_norm.hpp>

namespace colt5 {

namespace cuda {

/// Mean and 1 / √(σ² + ε) of a row, by its warp.
template <typename T>
struct RowMoments {
    using Sum = accumulate_t<T>;
    __device__ RowMoments(const T* x, Index d) {
        Sum sum = 0, squares = 0;
        for (Index j = threadIdx.x % warp_size; j < d; j += warp_size) sum += static_cast<Sum>(x[j]);
        mean = warp_sum(sum) / static_cast<Sum>(d);
        for (Index j = threadIdx.x % warp_size; j < d; j += warp_size) {
            const Sum centered = static_cast<Sum>(x[j]) - mean;
            squares += centered * centered;
        }
        inverse = Sum(1) / ::sqrt(warp_sum(squares) / static_cast<Sum>(d) + static_cast<Sum>(layer_norm_eps));
    }
    Sum mean, inverse;
};

/// One warp a row.
template <typename T>
__global__ void layer_norm(T* y, const T* x, const T* weight, const T* bias, Index rows, Index d) {
    using Sum = accumulate_t<T>;
    for (Index row = global_thread() / warp_size; row < rows; row += all_threads() / warp_size) {
        const T* const in = x + row * d;
        const RowMoments<T> moments(in, d);
        for (Index j = threadIdx.x % warp_size; j < d; j += warp_size) {
            const Sum z = (static_cast<Sum>(in[j]) - moments.mean) * moments.inverse;
            y[row * d + j] = static_cast<T>(z * static_cast<Sum>(weight[j]) + static_cast<Sum>(bias[j]));
        }
    }
}

/// dx, and the moments of each row for the gradients of weight and bias.
template <typename T>
__global__ void layer_norm_vjp(T* d_x, RowMoments<T>* moments, const T* d_y, const T* x, const T* weight, Index rows,
                               Index d) {
    using Sum = accumulate_t<T>;
    const Index lane = threadIdx.x % warp_size;
    for (Index row = global_thread() / warp_size; row < rows; row += all_threads() / warp_size) {
        const T *const in = x + row * d, *const g = d_y + row * d;
        const RowMoments<T> of_row(in, d);
        Sum h_sum = 0, hz_sum = 0;
        for (Index j = lane; j < d; j += warp_size) {
            const Sum h = static_cast<Sum>(g[j]) * static_cast<Sum>(weight[j]);
            h_sum += h;
            hz_sum += h * (static_cast<Sum>(in[j]) - of_row.mean) * of_row.inverse;
        }
        const Sum h_mean = warp_sum(h_sum) / static_cast<Sum>(d), hz_mean = warp_sum(hz_sum) / static_cast<Sum>(d);
        for (Index j = lane; j < d; j += warp_size) {
            const Sum h = static_cast<Sum>(g[j]) * static_cast<Sum>(weight[j]);
            const Sum z = (static_cast<Sum>(in[j]) - of_row.mean) * of_row.inverse;
            d_x[row * d + j] = static_cast<T>(of_row.inverse * (h - h_mean - z * hz_mean));
        }
        if (lane == 0) moments[row] = of_row;
    }
}

/// dy ∘ z
template <typename T>
struct LayerNormWeightTerm {
    const T *d_y, *x;
    const RowMoments<T>* moments;
    Index d;
    __device__ accumulate_t<T> operator()(Index row, Index column) const {
        using Sum = accumulate_t<T>;
        const Sum z = (static_cast<Sum>(x[row * d + column]) - moments[row].mean) * moments[row].inverse;
        return static_cast<Sum>(d_y[row * d + column]) * z;
    }
};

/// dy
template <typename T>
struct EntryTerm {
    const T* data;
    Index d;
    __device__ accumulate_t<T> operator()(Index row, Index column) const {
        return static_cast<accumulate_t<T>>(data[row * d + column]);
    }
};

}  // namespace cuda

template <typename T>
void layer_norm_kernel(const Cuda& policy, MatrixView<T> y, MatrixView<const T> x, VectorView<const T> weight,
                       VectorView<const T> bias) {
    constexpr int threads = 256;
    const Index rows = x.extent(0), d = x.extent(1);
    cuda::launch(policy, "layer_norm", cuda::layer_norm<T>, cuda::blocks_for(rows * cuda::warp_size, threads), threads,
                 0, y.data(), x.data(), weight.data(), bias.data(), rows, d);
}

template <typename T>
void layer_norm_vjp_kernel(const Cuda& policy, MatrixView<T> d_x, VectorView<accumulate_t<T>> d_weight,
                           VectorView<accumulate_t<T>> d_bias, MatrixView<const T> d_y, MatrixView<const T> x,
                           VectorView<const T> weight) {
    constexpr int threads = 256;
    const Index rows = x.extent(0), d = x.extent(1);
    using Moments = cuda::RowMoments<T>;
    VectorTensor<std::byte, Cuda> storage(policy, {rows * static_cast<Index>(sizeof(Moments))});
    auto* const moments = reinterpret_cast<Moments*>(storage.data());
    cuda::launch(policy, "layer_norm_vjp", cuda::layer_norm_vjp<T>, cuda::blocks_for(rows * cuda::warp_size, threads),
                 threads, 0, d_x.data(), moments, d_y.data(), x.data(), weight.data(), rows, d);
    cuda::add_column_sums(policy, d_weight, rows, cuda::LayerNormWeightTerm<T>{d_y.data(), x.data(), moments, d});
    cuda::add_column_sums(policy, d_bias, rows, cuda::EntryTerm<T>{d_y.data(), d});
}

}  // namespace colt5
