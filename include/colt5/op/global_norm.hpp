// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/core/tensor.hpp>

namespace colt5 {

template <typename P>
double sum_of_squares_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `sum_of_squares` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
    return 0;
}
template <typename P>
void scale_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `scale` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// Σ (scale · x)², in double whatever the scalar, in an order that does not depend on the number of threads.
template <Policy P, Viewable X>
double sum_of_squares(const P& policy, const X& x, double scale = 1) {
    return sum_of_squares_kernel(policy, x.const_view().reshape(std::array{x.const_view().size()}), scale);
}

/// x *= factor, the factor rounded to the scalar of x.
template <Policy P, Viewable X>
void scale(const P& policy, X& x, double factor) {
    scale_kernel(policy, x.view().reshape(std::array{x.view().size()}), factor);
}

}  // namespace colt5
