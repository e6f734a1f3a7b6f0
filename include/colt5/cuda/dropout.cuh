// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/dropout.hpp>

namespace colt5 {

namespace cuda {

/// A thread takes the four elements of one block of random numbers. With width = 4 they are in one row, and aligned.
template <typename T, int width>
__global__ void dropout(T* out, const T* x, const T* residual, const bool* mask, DropoutMask drop, Index columns,
                        Index size) {
    using Sum = accumulate_t<T>;
    static_assert(width == 1 || width == 4);
    const std::uint32_t threshold = drop.threshold();
    const Sum factor = static_cast<Sum>(drop.scale());
    for (Index block = global_thread(); block * 4 < size; block += grid_threads()) {
        const auto bits = drop.random.bits(static_cast<std::uint64_t>(block));
#pragma unroll
        for (int first = 0; first < 4; first += width) {
            const Index at = block * 4 + first;
            if (at >= size) continue;
            Pack<T, width> values = load_pack<width>(x + at), add{};
            if (residual) add = load_pack<width>(residual + at);
            if (residual && is_padding(mask, quotient(at, columns))) add = finite_or_zero(add);
            for (int k = 0; k < width; ++k) {
                const bool keeps = bits[static_cast<std::size_t>(first + k)] >= threshold;
                const Sum value = keeps ? factor * static_cast<Sum>(values.values[k]) : Sum(0);
                values.values[k] = static_cast<T>(residual ? static_cast<Sum>(add.values[k]) + value : value);
            }
            store_pack(out + at, values);
        }
    }
}

}  // namespace cuda

template <typename T>
void dropout_kernel(const Cuda& policy, TokensView<T> out, TokensView<const T> x, TokensView<const T> residual,
                    Mask mask, const DropoutMask& drop) {
    constexpr int threads = 256;
    const Index dim = x.extent(2), size = x.size();
    const auto start = [&](auto* kernel) {
        cuda::launch(policy, "dropout", kernel, cuda::blocks_for(divide_up(size, 4), threads), threads, 0, out.data(),
                     x.data(), residual.data(), mask.data(), drop, dim, size);
    };
    if (dim % 4 == 0 && cuda::fits_packs<T>(cuda::pack_size<T>, out.data(), x.data(), residual.data()))
        start(cuda::dropout<T, 4>);
    else
        start(cuda::dropout<T, 1>);
}

}  // namespace colt5
