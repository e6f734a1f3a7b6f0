// SPDX-License-Identifier: MIT
#pragma once

#include <type_traits>

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/zero.hpp>

namespace colt5 {

template <typename T>
void zero_kernel(const Cuda& policy, VectorView<T> x) {
    static_assert(std::is_trivially_copyable_v<T>);  // and 0 is all bits 0
    if (x.size() == 0) return;
    const cuda::DeviceGuard guard(policy.device());
    cuda::check(cudaMemsetAsync(x.data(), 0, static_cast<std::size_t>(x.size()) * sizeof(T), policy.stream()),
                "cudaMemsetAsync");
}

}  // namespace colt5
