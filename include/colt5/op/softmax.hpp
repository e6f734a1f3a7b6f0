// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/core/tensor.hpp>
#include <colt5/expr/expr.hpp>

namespace colt5 {

/// Softmax over the last axis:  y = exp(x − log Σ exp(x)).  Any shape.
template <Policy P, Viewable X>
auto softmax(const P& policy, const X& x) {
    auto y = tensor_like(policy, x);
    assign(policy, y, exp(x - row_log_sum_exp(x)));
    return y;
}

/// Vector-Jacobian product of softmax, from its output y:  dx = y ∘ (dy − Σ dy ∘ y).
template <Policy P, Viewable D, Viewable Y>
auto softmax_vjp(const P& policy, const D& d_y, const Y& y) {
    expect_shape("d_y", d_y.shape(), y.shape());
    auto d_x = tensor_like(policy, y);
    assign(policy, d_x, y * (d_y - row_sum(d_y * y)));
    return d_x;
}

}  // namespace colt5
