// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/core/tensor.hpp>
#include <colt5/expr/expr.hpp>

namespace colt5 {

/// GELU in its exact form:  y = x · Φ(x),  Φ(x) = (1 + erf(x / √2)) / 2.  Any shape.
template <Policy P, Viewable X>
auto gelu_forward(const P& policy, const X& x) {
    auto y = tensor_like(policy, x);
    assign(policy, y, gelu(x));
    return y;
}

/// Vector-Jacobian product of GELU, in place:  dy ← dy · (Φ(x) + x φ(x)),  φ(x) = exp(−x² / 2) / √(2π).
template <Policy P, Viewable X, Viewable D>
void gelu_vjp(const P& policy, D& d_y, const X& x) {
    expect_shape("d_y", d_y.shape(), x.shape());
    assign(policy, d_y, d_y * gelu_slope(x));
}

}  // namespace colt5
