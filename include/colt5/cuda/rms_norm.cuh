// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/column_sums.cuh>
#include <colt5/cuda/launch.cuh>
#include <colt5/cuda/warp_row.cuh>
#include <colt5/op/rms_norm.hpp>

namespace colt5 {

namespace cuda {

/// √d / max(‖x‖, 1e-12) of a row, by its warp.
template <typename Sum>
struct RowScale {
    template <typename Row>
    __device__ RowScale(const Row& x, Index d) {
        square = 0;
        x.for_each([&](Index, const auto& in) {
            for (const auto value : in.values) square += static_cast<Sum>(value) * static_cast<Sum>(value);
        });
        square = warp_sum(square);
        const Sum norm = ::sqrt(square), floor = static_cast<Sum>(rms_norm_floor);
        above_floor = norm > floor;
        scale = ::sqrt(static_cast<Sum>(d)) / (above_floor ? norm : floor);
    }
    Sum square, scale;
    bool above_floor;
};

/// One warp a row.
template <int width, int packs, typename T>
__global__ void rms_norm(T* y, const T* x, const T* gamma, Index rows, Index d) {
    using Sum = accumulate_t<T>;
    for (Index row = global_thread() / warp_size; row < rows; row += all_threads() / warp_size) {
        const WarpRow<T, width, packs> in(x + row * d, d);
        const RowScale<Sum> of_row(in, d);
        in.for_each([&](Index j, const auto& xs) {
            const auto gammas = load_pack<width>(gamma + j);
            Pack<T, width> out;
            for (int e = 0; e < width; ++e)
                out.values[e] =
                    static_cast<T>(static_cast<Sum>(xs.values[e]) * of_row.scale * static_cast<Sum>(gammas.values[e]));
            store_pack(y + row * d + j, out);
        });
    }
}

/// dx, and what the rows of a block add to d_gamma.
template <int width, int packs, typename T>
__global__ void __launch_bounds__(sum_threads)
    rms_norm_vjp(T* d_x, const T* d_y, const T* x, const T* gamma, Index d, accumulate_t<T>* partial,
                 accumulate_t<T>* global, Index rows, Index rows_each) {
    using Sum = accumulate_t<T>;
    const WarpSums<Sum> sums(global, d);
    LaneSums<Sum, width, packs> d_gamma(sums.mine());
    const Index end = ::min(rows, (blockIdx.x + 1) * rows_each), warps = sum_threads / warp_size;
    for (Index row = blockIdx.x * rows_each + threadIdx.x / warp_size; row < end; row += warps) {
        const WarpRow<T, width, packs> in(x + row * d, d), d_out(d_y + row * d, d);
        const RowScale<Sum> of_row(in, d);
        Sum product = 0;  // h·x
        in.for_each_with(d_out, [&](int i, Index j, const auto& xs, const auto& dys) {
            const auto gammas = load_pack<width>(gamma + j);
            for (int e = 0; e < width; ++e) {
                const Sum along = static_cast<Sum>(xs.values[e]) * static_cast<Sum>(dys.values[e]);
                product += along * static_cast<Sum>(gammas.values[e]);
                d_gamma.add(i, j, e, along * of_row.scale);
            }
        });
        product = warp_sum(product);
        const Sum along_x = of_row.above_floor ? product / of_row.square : Sum(0);
        in.for_each_with(d_out, [&](int, Index j, const auto& xs, const auto& dys) {
            const auto gammas = load_pack<width>(gamma + j);
            Pack<T, width> out;
            for (int e = 0; e < width; ++e) {
                const Sum h = static_cast<Sum>(dys.values[e]) * static_cast<Sum>(gammas.values[e]);
                out.values[e] = static_cast<T>(of_row.scale * (h - static_cast<Sum>(xs.values[e]) * along_x));
            }
            store_pack(d_x + row * d + j, out);
        });
    }
    d_gamma.flush(d);
    sums.write(partial);
}

}  // namespace cuda

template <typename T>
void rms_norm_kernel(const Cuda& policy, MatrixView<T> y, MatrixView<const T> x, VectorView<const T> gamma) {
    constexpr int threads = 256;
    const Index rows = x.extent(0), d = x.extent(1);
    cuda::with_warp_row<T>(
        d,
        [&]<int width, int packs>() {
            cuda::launch(policy, "rms_norm", cuda::rms_norm<width, packs, T>,
                         cuda::blocks_for(rows * cuda::warp_size, threads), threads, 0, y.data(), x.data(),
                         gamma.data(), rows, d);
        },
        y.data(), x.data(), gamma.data());
}

template <typename T>
void rms_norm_vjp_kernel(const Cuda& policy, MatrixView<T> d_x, VectorView<accumulate_t<T>> d_gamma,
                         MatrixView<const T> d_y, MatrixView<const T> x, VectorView<const T> gamma) {
    const Index rows = x.extent(0), d = x.extent(1);
    cuda::with_warp_row<T>(
        d,
        [&]<int width, int packs>() {
            cuda::launch_with_sums(policy, "rms_norm_vjp", cuda::rms_norm_vjp<width, packs, T>, {d_gamma.data()}, rows,
                                   d, d_x.data(), d_y.data(), x.data(), gamma.data(), d);
        },
        d_x.data(), d_y.data(), x.data(), gamma.data());
}

}  // namespace colt5
