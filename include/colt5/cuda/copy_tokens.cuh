// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/copy_tokens.hpp>

namespace colt5 {

template <typename T>
void copy_tokens_kernel(const Cuda& policy, TokensView<T> to, Index to_first, TokensView<const T> from,
                        Index from_first, Index count) {
    const Index width = to.extent(2);
    if (to.extent(0) == 0 || count == 0 || width == 0) return;
    const auto bytes = [&](Index tokens) { return static_cast<std::size_t>(tokens * width) * sizeof(T); };
    const cuda::DeviceGuard guard(policy.device());
    if (std::max(bytes(to.extent(1)), bytes(from.extent(1))) > std::numeric_limits<int>::max()) {  // no pitch
        for (Index b = 0; b < to.extent(0); ++b)
            cuda::check(cudaMemcpyAsync(&to(b, to_first, 0), &from(b, from_first, 0), bytes(count),
                                        cudaMemcpyDeviceToDevice, policy.stream()),
                        "cudaMemcpyAsync");
        return;
    }
    cuda::check(cudaMemcpy2DAsync(to.data() + to_first * width, bytes(to.extent(1)), from.data() + from_first * width,
                                  bytes(from.extent(1)), bytes(count), static_cast<std::size_t>(to.extent(0)),
                                  cudaMemcpyDeviceToDevice, policy.stream()),
                "cudaMemcpy2DAsync");
}

}  // namespace colt5
