// SPDX-License-Identifier: MIT
#pragma once

#include <string_view>

#include <colt5/op/gradient_epilogue.hpp>
#include <colt5/op/rms_norm.hpp>

namespace colt5 {

/// The parameters of a feedforward, or their gradients.
template <typename T>
struct FeedForwardParameters {
    RMSNormParameters<T> norm;
    MatrixView<T> hidden_weight;   // (h, d)
    VectorView<T> hidden_bias;     // (h)
    MatrixView<T> project_weight;  // (d, h)
    VectorView<T> project_bias;    // (d)
};

template <typename P>
void feed_forward_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `feed_forward` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void feed_forward_vjp_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `feed_forward_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

namespace detail {
template <typename T>
void check_feed_forward(std::string_view prefix, const FeedForwardParameters<T>& parameters, Index dim, Index hidden) {
    expect_shape(prefix, "norm", parameters.norm.gamma.shape(), {dim});
    expect_shape(prefix, "hidden_weight", parameters.hidden_weight.shape(), {hidden, dim});
    expect_shape(prefix, "hidden_bias", parameters.hidden_bias.shape(), {hidden});
    expect_shape(prefix, "project_weight", parameters.project_weight.shape(), {dim, hidden});
    expect_shape(prefix, "project_bias", parameters.project_bias.shape(), {dim});
}
}  // namespace detail

/// y = gelu(norm(x) · hidden_weightᵀ + hidden_bias) · project_weightᵀ + project_bias + add
///
///     x (b, n, d), norm: RMSNorm, add (b, n, d) or absent
/// The result goes to y (b, n, d). `pre_activation` (b, n, h), unless absent, gets what GELU is applied to: the
/// vector-Jacobian product reads it, or recomputes it.
template <Policy P, Viewable Y, Viewable X>
void feed_forward(const P& policy, const Y& y, const X& x,
                  const FeedForwardParameters<const typename X::value_type>& parameters,
                  TokensView<typename X::value_type> pre_activation = {},
                  TokensView<const typename X::value_type> add = {}) {
    static_assert(is_output<Y>, "colt5: `y` must be a view to write to, such as tensor.view()");
    static_assert(same_scalar<X, Y>, "colt5: `y` must have the scalar type of `x`");
    detail::check_feed_forward("", parameters, x.extent(2), parameters.hidden_weight.extent(0));
    expect_shape("y", y.shape(), x.shape());
    if (pre_activation)
        expect_shape("pre_activation", pre_activation.shape(),
                     {x.extent(0), x.extent(1), parameters.hidden_weight.extent(0)});
    if (add) expect_shape("add", add.shape(), x.shape());
    feed_forward_kernel(policy, y.view(), pre_activation, x.const_view(), parameters, add);
}

/// The same, with a y of its own.
template <Policy P, Viewable X>
auto feed_forward(const P& policy, const X& x, const FeedForwardParameters<const typename X::value_type>& parameters,
                  TokensView<typename X::value_type> pre_activation = {},
                  TokensView<const typename X::value_type> add = {}) {
    TokensTensor<typename X::value_type, P> y(policy, x.shape());
    feed_forward(policy, y.view(), x, parameters, pre_activation, add);
    return y;
}

/// Vector-Jacobian product of feed_forward, to d_x (b, n, d), with the epilogue of its norm, whose d_residual must not
/// overlap d_x. Without `pre_activation`, that is recomputed. The gradients of the parameters accumulate.
template <Policy P, Viewable DX, Viewable Y, Viewable X, std::size_t updates = 0>
void feed_forward_vjp(const P& policy, const DX& d_x, const Y& d_y, const X& x,
                      TokensView<const typename X::value_type> pre_activation,
                      const FeedForwardParameters<const typename X::value_type>& parameters,
                      const FeedForwardParameters<accumulate_t<typename X::value_type>>& gradients,
                      const GradientEpilogue<typename X::value_type, P, updates>& epilogue = {}) {
    static_assert(is_output<DX>, "colt5: `d_x` must be a view to write to, such as tensor.view()");
    static_assert(same_scalar<X, DX, Y>, "colt5: `d_x` and `d_y` must have the scalar type of `x`");
    const Index hidden = parameters.hidden_weight.extent(0);
    detail::check_feed_forward("", parameters, x.extent(2), hidden);
    detail::check_feed_forward("gradients.", gradients, x.extent(2), hidden);
    expect_shape("d_x", d_x.shape(), x.shape());
    expect_shape("d_y", d_y.shape(), x.shape());
    if (pre_activation) expect_shape("pre_activation", pre_activation.shape(), {x.extent(0), x.extent(1), hidden});
    detail::check_epilogue(epilogue, x);
    feed_forward_vjp_kernel(policy, d_x.view(), gradients, d_y.const_view(), x.const_view(), pre_activation, parameters,
                            epilogue);
}

}  // namespace colt5
