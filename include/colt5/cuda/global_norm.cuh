// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/launch.cuh>
#include <colt5/op/global_norm.hpp>

namespace colt5 {

namespace cuda {

inline constexpr int norm_blocks = 1024, norm_threads = 256;

/// One sum a block: of every gridDim.x-th element. Launched with one block, it adds the sums of a first launch up.
template <typename T, bool square>
__global__ void add_up(double* sums, const T* x, Index size) {
    double sum = 0;
    for (Index i = global_thread(); i < size; i += all_threads()) {
        const auto value = static_cast<double>(x[i]);
        sum += square ? value * value : value;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <typename T>
__global__ void scale(T* x, Index size, T factor) {
    using Real = accumulate_t<T>;
    for (Index i = global_thread(); i < size; i += all_threads())
        x[i] = static_cast<T>(static_cast<Real>(x[i]) * static_cast<Real>(factor));
}

}  // namespace cuda

/// Waits for the result.
template <typename T>
double sum_of_squares_kernel(const Cuda& policy, VectorView<const T> x) {
    if (x.size() == 0) return 0;
    using cuda::norm_blocks, cuda::norm_threads;
    const Index blocks = std::min(Index{norm_blocks}, cuda::divide_up(x.size(), norm_threads));
    VectorTensor<double, Cuda> sums(policy, {blocks}), total(policy, {1});
    cuda::launch(policy, "sum_of_squares", cuda::add_up<T, true>, cuda::grid(blocks), norm_threads, 0, sums.data(),
                 x.data(), x.size());
    cuda::launch(policy, "sum", cuda::add_up<double, false>, cuda::grid(1), norm_threads, 0, total.data(), sums.data(),
                 blocks);
    double result = 0;
    download(policy, &result, total.data(), sizeof(result));
    return result;
}

template <typename T>
void scale_kernel(const Cuda& policy, VectorView<T> x, double factor) {
    constexpr int threads = 256;
    cuda::launch(policy, "scale", cuda::scale<T>, cuda::blocks_for(x.size(), threads), threads, 0, x.data(), x.size(),
                 static_cast<T>(factor));
}

}  // namespace colt5
