// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/core/tensor.hpp>

namespace colt5 {

template <typename P>
void zero_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `zero` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// x = 0, whatever it held.
template <Policy P, Viewable X>
void set_zero(const P& policy, X& x) {
    zero_kernel(policy, x.view().reshape(std::array{x.view().size()}));
}

}  // namespace colt5
