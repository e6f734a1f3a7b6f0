// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/core/tensor.hpp>

namespace colt5 {

template <typename P>
void route_logits_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `route_logits` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void route_logits_vjp_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `route_logits_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// How well each token matches each routing token:  s[b, r, i] = scale · x[b, i] · routing_token[r]
///
///     x (b, n, d), routing_token (r, d)  →  s (b, r, n), in float or double whatever x is
template <Policy P, Viewable X, Viewable R>
auto route_logits(const P& policy, const X& x, const R& routing_token, double scale = 1) {
    using Logit = accumulate_t<typename X::value_type>;
    static_assert(same_scalar<X, R>, "colt5: `routing_token` must have the scalar type of `x`");
    expect_shape("routing_token", routing_token.shape(), {dynamic, x.extent(2)});
    Tensor<Logit, P, dynamic, dynamic, dynamic> logits(policy, {x.extent(0), routing_token.extent(0), x.extent(1)});
    route_logits_kernel(policy, logits.view(), x.const_view(), routing_token.const_view(), static_cast<Logit>(scale));
    return logits;
}

/// Vector-Jacobian product of route_logits. A router shares its input with other branches, so d_x accumulates too:
///
///     d_x[b, i] += scale · Σ_r ds[b, r, i] routing_token[r],   d_routing_token[r] += scale · Σ ds[b, r, i] x[b, i]
template <Policy P, Viewable S, Viewable X, Viewable R>
void route_logits_vjp(const P& policy, TokensView<typename X::value_type> d_x,
                      MatrixView<accumulate_t<typename X::value_type>> d_routing_token, const S& d_logits, const X& x,
                      const R& routing_token, double scale = 1) {
    static_assert(same_scalar<X, R>, "colt5: `routing_token` must have the scalar type of `x`");
    static_assert(std::same_as<typename S::value_type, accumulate_t<typename X::value_type>>,
                  "colt5: `d_logits` must have the scalar type of the logits");
    expect_shape("routing_token", routing_token.shape(), {dynamic, x.extent(2)});
    expect_shape("d_logits", d_logits.shape(), {x.extent(0), routing_token.extent(0), x.extent(1)});
    expect_shape("d_x", d_x.shape(), x.shape());
    expect_shape("d_routing_token", d_routing_token.shape(), routing_token.shape());
    route_logits_vjp_kernel(policy, d_x, d_routing_token, d_logits.const_view(), x.const_view(),
                            routing_token.const_view(), static_cast<typename S::value_type>(scale));
}

}  // namespace colt5
