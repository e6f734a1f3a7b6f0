// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cpu/parallel.hpp>
#include <colt5/op/zero.hpp>

namespace colt5 {

template <typename T>
void zero_kernel(const Cpu& policy, VectorView<T> x) {
    constexpr Index chunk = Index{1} << 16;  // of one task: smaller tensors stay on one thread
    parallel_for(policy, divide_up(x.size(), chunk),
                 [&](Index i) { std::fill_n(x.data() + i * chunk, std::min(chunk, x.size() - i * chunk), T(0)); });
}

}  // namespace colt5
