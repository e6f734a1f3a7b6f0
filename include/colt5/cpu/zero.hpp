// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/op/zero.hpp>

namespace colt5 {

template <typename T>
void zero_kernel(const Cpu&, VectorView<T> x) {
    std::fill_n(x.data(), x.size(), T(0));
}

}  // namespace colt5
