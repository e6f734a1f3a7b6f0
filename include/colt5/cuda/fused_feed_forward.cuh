// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cuda/fused_feed_forward_kernel.cuh>
#include <colt5/cuda/gelu.cuh>
#include <colt5/cuda/pack.cuh>
#include <colt5/cuda/rms_norm.cuh>
#include <colt5/cuda/warp_row.cuh>
#include <colt5/op/feed_forward.hpp>

/// The launch of the light feedforward's kernel, and of the kernel for the rows that it leaves out.
namespace colt5::cuda::fused {

/// Computes the rows of the list one by one, with a block for each.
template <typename T>
__global__ void __launch_bounds__(hidden)
    recompute_rows(RowList list, T* y, T* pre_activation, const T* x, const T* gamma, const bool* mask,
                   const T* hidden_weight, const T* hidden_bias, const T* project_weight, const T* project_bias,
                   const T* add) {
    __shared__ float normed[dim], h[hidden];
    const int thread = static_cast<int>(threadIdx.x), warp = thread / warp_size, lane = thread % warp_size;
    for (unsigned i = blockIdx.x; i < *list.count; i += gridDim.x) {
        const Index row = list.rows[i];
        if (warp == 0) {
            const WarpRow<T, 8, 2> in(x + row * dim, dim, is_padding(mask, row));
            const RowScale<float> of_row(in, dim);
            in.for_each([&](Index j, const auto& xs) {
                for (int e = 0; e < 8; ++e)
                    normed[j + e] = static_cast<float>(
                        static_cast<T>(of_row.in_unit(xs.values[e]) * of_row.scale * static_cast<float>(gamma[j + e])));
            });
        }
        __syncthreads();
        for (int j = warp; j < hidden; j += hidden / warp_size) {
            float sum = 0;
            for (int k = lane; k < dim; k += warp_size)
                sum += normed[k] * static_cast<float>(hidden_weight[j * dim + k]);
            const T value = static_cast<T>(warp_sum(sum) + static_cast<float>(hidden_bias[j]));
            if (lane == 0 && pre_activation != nullptr) pre_activation[row * hidden + j] = value;
            if (lane == 0) h[j] = static_cast<float>(static_cast<T>(Gelu<T>(static_cast<float>(value)).value));
        }
        __syncthreads();
        for (int j = warp; j < dim; j += hidden / warp_size) {
            float sum = 0;
            for (int k = lane; k < hidden; k += warp_size)
                sum += h[k] * static_cast<float>(project_weight[j * hidden + k]);
            sum = warp_sum(sum) + static_cast<float>(project_bias[j]);
            if (add != nullptr) sum += static_cast<float>(add[row * dim + j]);
            if (lane == 0) y[row * dim + j] = static_cast<T>(sum);
        }
        __syncthreads();
    }
}

/// Whether the kernel supports these shapes, addresses and this device. The number of tokens makes no difference.
template <typename T>
bool supports(const Cuda& policy, TokensView<T> y, TokensView<T> pre_activation, TokensView<const T> x,
              const FeedForwardParameters<const T>& parameters, TokensView<const T> add) {
    if (x.extent(2) != dim || parameters.hidden_weight.extent(0) != hidden ||
        !fits_packs<T>(dim, y.data(), pre_activation.data(), x.data(), add.data(), parameters.norm.gamma.data(),
                       parameters.hidden_weight.data(), parameters.hidden_bias.data(), parameters.project_weight.data(),
                       parameters.project_bias.data()))
        return false;
    const DeviceGuard guard(policy.device());
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, feed_forward<T>), "cudaFuncGetAttributes");
    return attributes.maxThreadsPerBlock >= threads;
}

template <typename T>
void launch_feed_forward(const Cuda& policy, TokensView<T> y, TokensView<T> pre_activation, TokensView<const T> x,
                         const FeedForwardParameters<const T>& parameters, TokensView<const T> add) {
    const Index rows = x.extent(0) * x.extent(1), tiles = divide_up(rows, Index{tile_rows});
    if (rows == 0) return;
    const auto& [norm, hidden_weight, hidden_bias, project_weight, project_bias] = parameters;
    VectorTensor<T, Cuda> weights(policy, {2 * hidden * dim});
    VectorTensor<int, Cuda> list(policy, {1 + rows});
    const RowList to_recompute{reinterpret_cast<unsigned*>(list.data()), list.data() + 1};
    constexpr int layout_threads = 256;
    launch(policy, "lay_out_weights", lay_out_weights<T>, grid(divide_up(2 * hidden * dim / 8, layout_threads)),
           layout_threads, 0, weights.data(), to_recompute, hidden_weight.data(), norm.gamma.data(),
           project_weight.data());
    const Index processors = multiprocessors(policy);
    launch(policy, "feed_forward", feed_forward<T>, grid(std::min(tiles, processors)), threads, shared_bytes,
           hopper::tensor_map<T>(x.data(), rows, dim, tile_rows), y.data(), static_cast<const T*>(weights.data()),
           hidden_bias.data(), project_bias.data(), pre_activation.data(), add.data(), to_recompute, rows,
           static_cast<int>(tiles));
    launch(policy, "recompute_rows", recompute_rows<T>, grid(std::min(rows, processors)), hidden, 0, to_recompute,
           y.data(), pre_activation.data(), x.data(), norm.gamma.data(), norm.clean_mask.data(), hidden_weight.data(),
           hidden_bias.data(), project_weight.data(), project_bias.data(), add.data());
}

}  // namespace colt5::cuda::fused
