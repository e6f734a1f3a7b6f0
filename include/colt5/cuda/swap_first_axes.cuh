// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/swap_first_axes.hpp>

namespace colt5 {

namespace cuda {

/// y[b, j, i] = x[b, i, j]
template <typename T>
__global__ void swap_first_axes(View<T, dynamic, dynamic, dynamic, dynamic> y,
                                View<const T, dynamic, dynamic, dynamic, dynamic> x) {
    const Index rows = x.extent(1), columns = x.extent(2), entries = x.extent(3), count = x.size();
    for (Index i = global_thread(); i < count; i += grid_threads()) {
        const Index row = i / entries;
        y(row / columns / rows, row % columns, row / columns % rows, i % entries) = x.data()[i];
    }
}

}  // namespace cuda

template <typename T>
void swap_first_axes_kernel(const Cuda& policy, View<T, dynamic, dynamic, dynamic, dynamic> y,
                            View<const T, dynamic, dynamic, dynamic, dynamic> x) {
    constexpr int threads = 256;
    cuda::launch(policy, "swap_first_axes", cuda::swap_first_axes<T>, cuda::blocks_for(x.size(), threads), threads, 0,
                 y, x);
}

}  // namespace colt5
