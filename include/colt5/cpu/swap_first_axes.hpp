// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cpu/parallel.hpp>
#include <colt5/op/swap_first_axes.hpp>

namespace colt5 {

/// y[b, j, i] = x[b, i, j]
template <typename T>
void swap_first_axes_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> y,
                            View<const T, dynamic, dynamic, dynamic, dynamic> x) {
    parallel_for(policy, x.extent(0) * x.extent(2), [&](Index task) {
        const Index b = task / x.extent(2), j = task % x.extent(2);
        for (Index i = 0; i < x.extent(1); ++i) std::copy_n(x[b][i][j].data(), x.extent(3), y[b][j][i].data());
    });
}

}  // namespace colt5
