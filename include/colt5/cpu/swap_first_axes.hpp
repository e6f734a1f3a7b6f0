// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cpu/policy.hpp>
#include <colt5/op/swap_first_axes.hpp>

namespace colt5 {

template <typename T>
void swap_first_axes_kernel(const Cpu&, TokensView<T> y, TokensView<const T> x) {
    for (Index i = 0; i < x.extent(0); ++i)
        for (Index j = 0; j < x.extent(1); ++j) std::copy_n(x[i][j].data(), x.extent(2), y[j][i].data());
}

}  // namespace colt5
