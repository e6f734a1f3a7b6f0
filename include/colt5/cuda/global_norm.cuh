// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/global_norm.hpp>

namespace colt5 {

namespace cuda {

inline constexpr int norm_blocks = 1024, norm_threads = 256;

/// One sum for each block, over the grid-stride loop's entries times `scale`, or over their squares. A second launch
/// with one block adds the sums of the first.
template <typename T, bool square>
__global__ void add_up(double* sums, const T* x, Index size, double scale, bool packed) {
    double sum = 0;
    for_each_pack<pack_size<T>>(size, packed, [&]<int width>(Index i, std::integral_constant<int, width>) {
        const auto pack = load_pack<width>(x + i);
        for (int e = 0; e < width; ++e) {
            const double value = scale * static_cast<double>(pack.values[e]);
            sum += square ? value * value : value;
        }
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <typename T>
__global__ void scale(T* x, Index size, T factor, bool packed) {
    using Real = accumulate_t<T>;
    for_each_pack<pack_size<T>>(size, packed, [&]<int width>(Index i, std::integral_constant<int, width>) {
        auto pack = load_pack<width>(x + i);
        for (int e = 0; e < width; ++e)
            pack.values[e] = static_cast<T>(static_cast<Real>(pack.values[e]) * static_cast<Real>(factor));
        store_pack(x + i, pack);
    });
}

}  // namespace cuda

/// Waits for the result.
template <typename T>
double sum_of_squares_kernel(const Cuda& policy, VectorView<const T> x, double scale) {
    if (x.size() == 0) return 0;
    using cuda::norm_blocks, cuda::norm_threads;
    const Index blocks = std::min(Index{norm_blocks}, divide_up(x.size(), norm_threads));
    VectorTensor<double, Cuda> sums(policy, {blocks}), total(policy, {1});
    cuda::launch(policy, "sum_of_squares", cuda::add_up<T, true>, cuda::grid(blocks), norm_threads, 0, sums.data(),
                 x.data(), x.size(), scale, cuda::fits_packs<T>(0, x.data()));
    cuda::launch(policy, "sum", cuda::add_up<double, false>, cuda::grid(1), norm_threads, 0, total.data(), sums.data(),
                 blocks, 1.0, false);
    double result = 0;
    download(policy, &result, total.data(), sizeof(result));
    return result;
}

template <typename T>
void scale_kernel(const Cuda& policy, VectorView<T> x, double factor) {
    constexpr int threads = 256;
    cuda::launch(policy, "scale", cuda::scale<T>, cuda::blocks_for(x.size(), threads), threads, 0, x.data(), x.size(),
                 static_cast<T>(factor), cuda::fits_packs<T>(0, x.data()));
}

}  // namespace colt5
