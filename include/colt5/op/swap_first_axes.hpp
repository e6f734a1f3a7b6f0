// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/core/tensor.hpp>

namespace colt5 {

template <typename P>
void swap_first_axes_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `swap_first_axes` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// y[j, i, k] = x[i, j, k]: what is sorted by sample and route, sorted by route and sample; and back.
///
///     x (b, r, k)  →  (r, b, k)
template <Policy P, Viewable X>
auto swap_first_axes(const P& policy, const X& x) {
    const auto [samples, routes, picks] = x.shape();
    TokensTensor<typename X::value_type, P> y(policy, {routes, samples, picks});
    swap_first_axes_kernel(policy, y.view().reshape(std::array{Index{1}, routes, samples, picks}),
                           x.const_view().reshape(std::array{Index{1}, samples, routes, picks}));
    return y;
}

/// The same in each sample: what is sorted by route and pick, sorted by pick and route; and back.
///
///     x (b, r, k, d)  →  (b, k, r, d)
template <Policy P, Viewable X>
auto swap_middle_axes(const P& policy, const X& x) {
    const auto [samples, routes, picks, dim] = x.shape();
    Tensor<typename X::value_type, P, dynamic, dynamic, dynamic, dynamic> y(policy, {samples, picks, routes, dim});
    swap_first_axes_kernel(policy, y.view(), x.const_view());
    return y;
}

}  // namespace colt5
