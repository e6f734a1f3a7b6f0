// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/swap_first_axes.hpp>

namespace colt5 {

namespace cuda {

template <typename T>
__global__ void swap_first_axes(TokensView<T> y, TokensView<const T> x) {
    const Index routes = x.extent(1), picks = x.extent(2), count = x.size();
    for (Index i = global_thread(); i < count; i += grid_threads())
        y(i / picks % routes, i / picks / routes, i % picks) = x.data()[i];
}

}  // namespace cuda

template <typename T>
void swap_first_axes_kernel(const Cuda& policy, TokensView<T> y, TokensView<const T> x) {
    constexpr int threads = 256;
    cuda::launch(policy, "swap_first_axes", cuda::swap_first_axes<T>, cuda::blocks_for(x.size(), threads), threads, 0,
                 y, x);
}

}  // namespace colt5
