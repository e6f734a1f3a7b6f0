// SPDX-License-Identifier: MIT
#pragma once

#include <numbers>

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
    using Scalar = accumulate_t<typename X::value_type>;
    expect_shape("d_y", d_y.shape(), x.shape());
    constexpr auto half_root = static_cast<Scalar>(1 / std::numbers::sqrt2);
    constexpr auto density = static_cast<Scalar>(std::numbers::inv_sqrtpi / std::numbers::sqrt2);
    const auto cumulative = Scalar(0.5) * (Scalar(1) + erf(as_expression(x) * half_root));
    assign(policy, d_y, d_y * (cumulative + x * (density * exp(square(as_expression(x)) * Scalar(-0.5)))));
}

}  // namespace colt5
