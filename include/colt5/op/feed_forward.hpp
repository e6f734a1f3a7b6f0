// SPDX-License-Identifier: MIT
#pragma once

#include <string_view>
#include <utility>

#include <colt5/expr/expr.hpp>
#include <colt5/op/gelu.hpp>
#include <colt5/op/linear.hpp>
#include <colt5/op/rms_norm.hpp>
#include <colt5/op/shared_gradient.hpp>

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

namespace detail {
/// One step after the other.
template <Policy P, typename T>
void feed_forward_in_steps(const P& policy, TokensView<T> y, TokensView<T> before, TokensView<const T> x,
                           const FeedForwardParameters<const T>& parameters, TokensView<const T> add) {
    const auto& [norm, hidden_weight, hidden_bias, project_weight, project_bias] = parameters;
    TokensTensor<T, P> h;  // (b, n, h)
    if (before) {
        linear(policy, before, normalize(policy, x, norm), hidden_weight, hidden_bias);
        h = gelu_forward(policy, before);
    } else {
        h = linear(policy, normalize(policy, x, norm), hidden_weight, hidden_bias);
        assign(policy, h, gelu(h));
    }
    linear(policy, y, h, project_weight, project_bias, add);
}
}  // namespace detail

/// For any policy. One that can keep some rows at hand overloads these.
template <Policy P, typename T>
void feed_forward_kernel(const P& policy, TokensView<T> y, TokensView<T> before, TokensView<const T> x,
                         const FeedForwardParameters<const T>& parameters, TokensView<const T> add) {
    detail::feed_forward_in_steps(policy, y, before, x, parameters, add);
}
template <Policy P, typename T, std::size_t routes>
void feed_forward_vjp_kernel(const P& policy, TokensView<T> d_x,
                             const FeedForwardParameters<accumulate_t<T>>& gradients, TokensView<const T> d_y,
                             TokensView<const T> x, TokensView<const T> before,
                             const FeedForwardParameters<const T>& parameters,
                             const SharedGradient<T, P, routes>& shared) {
    auto normed = normalize(policy, x, parameters.norm);  // (b, n, d)
    TokensTensor<T, P> again;
    if (!before) again = linear(policy, normed, parameters.hidden_weight, parameters.hidden_bias);
    if (!before) before = again.const_view();  // (b, n, h)
    auto d_h = linear_vjp(policy, d_y, gelu_forward(policy, before), parameters.project_weight,
                          gradients.project_weight, gradients.project_bias);
    gelu_vjp(policy, d_h, before);  // (b, n, h)
    again = {};                     // what is not read any more gives its memory to what follows
    const auto d_normed = linear_vjp(policy, d_h, std::move(normed), parameters.hidden_weight, gradients.hidden_weight,
                                     gradients.hidden_bias);
    normalize_vjp_kernel(policy, d_x, gradients.norm, d_normed.const_view(), x, parameters.norm, shared);
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
/// The result goes to y (b, n, d). `before` (b, n, h), unless absent, gets what GELU is applied to: the vector-Jacobian
/// product reads it, or computes it again.
template <Policy P, Viewable Y, Viewable X>
void feed_forward(const P& policy, const Y& y, const X& x,
                  const FeedForwardParameters<const typename X::value_type>& parameters,
                  TokensView<typename X::value_type> before = {}, TokensView<const typename X::value_type> add = {}) {
    detail::check_feed_forward("", parameters, x.extent(2), parameters.hidden_weight.extent(0));
    expect_shape("y", y.shape(), x.shape());
    if (before) expect_shape("before", before.shape(), {x.extent(0), x.extent(1), parameters.hidden_weight.extent(0)});
    if (add) expect_shape("add", add.shape(), x.shape());
    feed_forward_kernel(policy, y.view(), before, x.const_view(), parameters, add);
}

/// The same, with a y of its own.
template <Policy P, Viewable X>
auto feed_forward(const P& policy, const X& x, const FeedForwardParameters<const typename X::value_type>& parameters,
                  TokensView<typename X::value_type> before = {}, TokensView<const typename X::value_type> add = {}) {
    TokensTensor<typename X::value_type, P> y(policy, x.shape());
    feed_forward(policy, y.view(), x, parameters, before, add);
    return y;
}

/// Vector-Jacobian product of feed_forward, to d_x (b, n, d), and what else goes there, which must not overlap it.
/// `before` may be absent. The gradients of the parameters grow.
template <Policy P, Viewable DX, Viewable Y, Viewable X, std::size_t routes = 0>
void feed_forward_vjp(const P& policy, const DX& d_x, const Y& d_y, const X& x,
                      TokensView<const typename X::value_type> before,
                      const FeedForwardParameters<const typename X::value_type>& parameters,
                      const FeedForwardParameters<accumulate_t<typename X::value_type>>& gradients,
                      const SharedGradient<typename X::value_type, P, routes>& shared = {}) {
    const Index hidden = parameters.hidden_weight.extent(0);
    detail::check_feed_forward("", parameters, x.extent(2), hidden);
    detail::check_feed_forward("gradients.", gradients, x.extent(2), hidden);
    expect_shape("d_x", d_x.shape(), x.shape());
    expect_shape("d_y", d_y.shape(), x.shape());
    if (before) expect_shape("before", before.shape(), {x.extent(0), x.extent(1), hidden});
    detail::check_shared_gradient(shared, x);
    feed_forward_vjp_kernel(policy, d_x.view(), gradients, d_y.const_view(), x.const_view(), before, parameters,
                            shared);
}

}  // namespace colt5
