// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/column_sums.cuh>
#include <colt5/cuda/launch.cuh>
#include <colt5/op/rms_norm.hpp>

namespace colt5 {

namespace cuda {

/// √d / max(‖x‖, 1e-12) of a row, by its warp.
template <typename T>
struct RowScale {
    using Sum = accumulate_t<T>;
    __device__ RowScale(const T* x, Index d) {
        square = 0;
        for (Index j = threadIdx.x % warp_size; j < d; j += warp_size) {
            const Sum v = static_cast<Sum>(x[j]);
            square += v * v;
        }
        square = warp_sum(square);
        const Sum norm = ::sqrt(square), floor = static_cast<Sum>(rms_norm_floor);
        above_floor = norm > floor;
        scale = ::sqrt(static_cast<Sum>(d)) / (above_floor ? norm : floor);
    }
    Sum square, scale;
    bool above_floor;
};

/// One warp a row.
template <typename T>
__global__ void rms_norm(T* y, const T* x, const T* gamma, Index rows, Index d) {
    using Sum = accumulate_t<T>;
    for (Index row = global_thread() / warp_size; row < rows; row += all_threads() / warp_size) {
        const T* const in = x + row * d;
        const RowScale<T> of_row(in, d);
        for (Index j = threadIdx.x % warp_size; j < d; j += warp_size)
            y[row * d + j] = static_cast<T>(static_cast<Sum>(in[j]) * of_row.scale * static_cast<Sum>(gamma[j]));
    }
}

/// dx, and the scale of each row for the gradient of gamma.
template <typename T>
__global__ void rms_norm_vjp(T* d_x, accumulate_t<T>* scales, const T* d_y, const T* x, const T* gamma, Index rows,
                             Index d) {
    using Sum = accumulate_t<T>;
    const Index lane = threadIdx.x % warp_size;
    for (Index row = global_thread() / warp_size; row < rows; row += all_threads() / warp_size) {
        const T *const in = x + row * d, *const g = d_y + row * d;
        const RowScale<T> of_row(in, d);
        Sum product = 0;  // h·x
        for (Index j = lane; j < d; j += warp_size)
            product += static_cast<Sum>(in[j]) * static_cast<Sum>(g[j]) * static_cast<Sum>(gamma[j]);
        product = warp_sum(product);
        const Sum along_x = of_row.above_floor ? product / of_row.square : Sum(0);
        for (Index j = lane; j < d; j += warp_size) {
            const Sum h = static_cast<Sum>(g[j]) * static_cast<Sum>(gamma[j]);
            d_x[row * d + j] = static_cast<T>(of_row.scale * (h - static_cast<Sum>(in[j]) * along_x));
        }
        if (lane == 0) scales[row] = of_row.scale;
    }
}

/// dy ∘ x · s
template <typename T>
struct RmsNormGammaTerm {
    const T *d_y, *x;
    const accumulate_t<T>* scales;
    Index d;
    __device__ accumulate_t<T> operator()(Index row, Index column) const {
        using Sum = accumulate_t<T>;
        return static_cast<Sum>(d_y[row * d + column]) * static_cast<Sum>(x[row * d + column]) * scales[row];
    }
};

}  // namespace cuda

template <typename T>
void rms_norm_kernel(const Cuda& policy, MatrixView<T> y, MatrixView<const T> x, VectorView<const T> gamma) {
    constexpr int threads = 256;
    const Index rows = x.extent(0), d = x.extent(1);
    cuda::launch(policy, "rms_norm", cuda::rms_norm<T>, cuda::blocks_for(rows * cuda::warp_size, threads), threads, 0,
                 y.data(), x.data(), gamma.data(), rows, d);
}

template <typename T>
void rms_norm_vjp_kernel(const Cuda& policy, MatrixView<T> d_x, VectorView<accumulate_t<T>> d_gamma,
                         MatrixView<const T> d_y, MatrixView<const T> x, VectorView<const T> gamma) {
    constexpr int threads = 256;
    const Index rows = x.extent(0), d = x.extent(1);
    VectorTensor<accumulate_t<T>, Cuda> scales(policy, {rows});
    cuda::launch(policy, "rms_norm_vjp", cuda::rms_norm_vjp<T>, cuda::blocks_for(rows * cuda::warp_size, threads),
                 threads, 0, d_x.data(), scales.data(), d_y.data(), x.data(), gamma.data(), rows, d);
    cuda::add_column_sums(policy, d_gamma, rows, cuda::RmsNormGammaTerm<T>{d_y.data(), x.data(), scales.data(), d});
}

}  // namespace colt5
