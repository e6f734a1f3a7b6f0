// SPDX-License-Identifier: MIT
#pragma once

#include <limits>

#include <colt5/core/tensor.hpp>
#include <colt5/expr/expr.hpp>

namespace colt5 {

template <typename P>
bool padding_is_finite_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `padding_is_finite` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
    return true;
}

/// Whether all numbers of masked tokens are finite: x (b, n, d), mask (b, n)
template <Policy P, Viewable X>
bool padding_is_finite(const P& policy, const X& x, Mask mask) {
    expect_shape("mask", mask.shape(), {x.extent(0), x.extent(1)});
    return padding_is_finite_kernel(policy, TokensView<const typename X::value_type>(x), mask);
}

/// A copy of the tokens in which masked tokens have 0 for what is not finite: x (b, n, d), mask (b, n)  →  (b, n, d)
template <Policy P, Viewable X>
auto copy_with_clean_padding(const P& policy, const X& x, Mask mask) {
    using Scalar = typename X::value_type;
    using Number = accumulate_t<Scalar>;
    expect_shape("mask", mask.shape(), {x.extent(0), x.extent(1)});
    TokensTensor<Scalar, P> copy(policy, x.shape());
    const auto is_finite = abs(as_expression(x)) <= std::numeric_limits<Number>::max();
    assign(policy, copy, select(column(mask) || is_finite, x, Number(0)));
    return copy;
}

}  // namespace colt5
