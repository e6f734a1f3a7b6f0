// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <utility>

#include <colt5/core/tensor.hpp>

namespace colt5 {

template <typename P>
void linear_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `linear` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
/// The gradient of the weight comes first: d_x may be x.
template <typename P>
void linear_vjp_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `linear_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

template <typename P>
void linear_add_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `linear_add` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

namespace detail {
/// (b, n, d) → (b, 1, n, d)
template <typename T>
auto one_route(TokensView<T> x) {
    return x.reshape(std::array{x.extent(0), Index{1}, x.extent(1), x.extent(2)});
}
}  // namespace detail

namespace detail {
template <typename X, typename W>
void check_routed_weight(const X& x, const W& weight) {
    static_assert(same_scalar<X, W>, "colt5: `weight` must have the scalar type of `x`");
    const Index routes = x.extent(1);
    expect_shape("weight", weight.shape(), {dynamic, x.extent(3)});
    expect_value(routes > 0 && weight.extent(0) % routes == 0, "weight",
                 "divisible by the number of routes in its rows", weight.extent(0));
}
}  // namespace detail

/// One linear map per route:  y[b, r] = x[b, r] · weight[r]ᵀ + bias[r]
///
///     x (b, r, n, in), weight (r · out, in), bias (r · out) or absent  →  y (b, r, n, out)
///
/// The result goes to y. Throws ShapeError when they do not fit together.
template <Policy P, Viewable Y, Viewable X, Viewable W>
requires(W::rank == 2) void routed_linear(const P& policy, const Y& y, const X& x, const W& weight,
                                          VectorView<const typename X::value_type> bias = {}) {
    static_assert(is_output<Y>, "colt5: `y` must be a view to write to, such as tensor.view()");
    static_assert(same_scalar<X, Y>, "colt5: `y` must have the scalar type of `x`");
    detail::check_routed_weight(x, weight);
    const Index routes = x.extent(1);
    expect_shape("y", y.shape(), {x.extent(0), routes, x.extent(2), weight.extent(0) / routes});
    if (bias) expect_shape("bias", bias.shape(), {weight.extent(0)});
    linear_kernel(policy, y.view(), x.const_view(), weight.const_view(), bias);
}

/// The same, with a y of its own.
template <Policy P, Viewable X, Viewable W>
auto routed_linear(const P& policy, const X& x, const W& weight, VectorView<const typename X::value_type> bias = {}) {
    using Scalar = typename X::value_type;
    detail::check_routed_weight(x, weight);
    Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic> y(
        policy, {x.extent(0), x.extent(1), x.extent(2), weight.extent(0) / x.extent(1)});
    routed_linear(policy, y.view(), x, weight, bias);
    return y;
}

namespace detail {
template <Policy P, Viewable DX, Viewable Y, Viewable X, Viewable W>
void routed_linear_vjp_into(const P& policy, const DX& d_x, const Y& d_y, const X& x, const W& weight,
                            MatrixView<accumulate_t<typename X::value_type>> d_weight,
                            VectorView<accumulate_t<typename X::value_type>> d_bias) {
    const auto [batch, routes, length, in] = x.shape();
    check_routed_weight(x, weight);
    static_assert(same_scalar<X, Y>, "colt5: `d_y` must have the scalar type of `x`");
    expect_shape("d_y", d_y.shape(), {batch, routes, length, weight.extent(0) / routes});
    expect_shape("d_weight", d_weight.shape(), weight.shape());
    if (d_bias) expect_shape("d_bias", d_bias.shape(), {weight.extent(0)});
    linear_vjp_kernel(policy, d_x, d_weight, d_bias, d_y.const_view(), x.const_view(), weight.const_view());
}
}  // namespace detail

/// Vector-Jacobian product of routed_linear:  dx = dy · weight,  d_weight += dyᵀ · x,  d_bias += Σ dy.
/// `d_bias` may be absent. Gradients of parameters are kept in accumulate_t of the scalar. Returns dx (b, r, n, in).
template <Policy P, Viewable X, Viewable W, Viewable Y>
auto routed_linear_vjp(const P& policy, const Y& d_y, const X& x, const W& weight,
                       MatrixView<accumulate_t<typename X::value_type>> d_weight,
                       VectorView<accumulate_t<typename X::value_type>> d_bias = {}) {
    using Scalar = typename X::value_type;
    Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic> d_x(policy, x.shape());
    detail::routed_linear_vjp_into(policy, d_x.view(), d_y, x, weight, d_weight, d_bias);
    return d_x;
}

/// The same for an x that is not needed any more: dx takes its memory.
template <Policy P, typename Scalar, Viewable W, Viewable Y>
auto routed_linear_vjp(const P& policy, const Y& d_y, Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic>&& x,
                       const W& weight, MatrixView<accumulate_t<Scalar>> d_weight,
                       VectorView<accumulate_t<Scalar>> d_bias = {}) {
    detail::routed_linear_vjp_into(policy, x.view(), d_y, x, weight, d_weight, d_bias);
    return std::move(x);
}

/// y = x · weightᵀ + bias + add, as torch.nn.Linear with something added, such as a residual:
///
///     x (b, n, in), weight (out, in), bias (out) and add (b, n, out), which may be absent
/// The result goes to y (b, n, out). Where x is of 16 bits, y may be of float, without bias and add: sums that are not
/// rounded.
template <Policy P, Viewable Y, Viewable X, Viewable W>
requires(W::rank == 2) void linear(const P& policy, const Y& y, const X& x, const W& weight,
                                   VectorView<const typename X::value_type> bias = {},
                                   TokensView<const typename X::value_type> add = {}) {
    static_assert(is_output<Y>, "colt5: `y` must be a view to write to, such as tensor.view()");
    using Scalar = typename X::value_type;
    constexpr bool in_sums = !same_scalar<X, Y> && std::same_as<typename Y::value_type, accumulate_t<Scalar>>;
    static_assert(same_scalar<X, W> && (same_scalar<X, Y> || in_sums),
                  "colt5: `weight` and `y` must have the scalar type of `x`");
    const auto [batch, length, in] = x.shape();
    expect_shape("weight", weight.shape(), {dynamic, in});
    expect_shape("y", y.shape(), {batch, length, weight.extent(0)});
    if (bias) expect_shape("bias", bias.shape(), {weight.extent(0)});
    if constexpr (in_sums) {
        expect_value(!bias, "bias", "absent for a float `y` of 16-bit `x`", "given");
        expect_value(!add, "add", "absent for a float `y` of 16-bit `x`", "given");
        linear_kernel(policy, detail::one_route(y.view()), detail::one_route(x.const_view()), weight.const_view(),
                      bias);
    } else if (add) {
        expect_shape("add", add.shape(), y.shape());
        linear_add_kernel(policy, y.view(), x.const_view(), weight.const_view(), bias, add);
    } else {
        linear_kernel(policy, detail::one_route(y.view()), detail::one_route(x.const_view()), weight.const_view(),
                      bias);
    }
}

/// The same, with a y of its own.
template <Policy P, Viewable X, Viewable W>
auto linear(const P& policy, const X& x, const W& weight, VectorView<const typename X::value_type> bias = {},
            TokensView<const typename X::value_type> add = {}) {
    static_assert(same_scalar<X, W>, "colt5: `weight` must have the scalar type of `x`");
    expect_shape("weight", weight.shape(), {dynamic, x.extent(2)});
    TokensTensor<typename X::value_type, P> y(policy, {x.extent(0), x.extent(1), weight.extent(0)});
    linear(policy, y.view(), x, weight, bias, add);
    return y;
}

namespace detail {
template <Policy P, typename Scalar, Viewable W, Viewable Y>
void linear_vjp_into(const P& policy, TokensView<Scalar> d_x, const Y& d_y, TokensView<const Scalar> x, const W& weight,
                     MatrixView<accumulate_t<Scalar>> d_weight, VectorView<accumulate_t<Scalar>> d_bias) {
    static_assert(same_scalar<TokensView<Scalar>, W, Y>, "colt5: `weight` and `d_y` must have the scalar type of `x`");
    const auto [batch, length, in] = x.shape();
    const Index out = weight.extent(0);
    expect_shape("d_y", d_y.shape(), {batch, length, out});
    expect_shape("weight", weight.shape(), {dynamic, in});
    expect_shape("d_weight", d_weight.shape(), weight.shape());
    if (d_bias) expect_shape("d_bias", d_bias.shape(), {out});
    linear_vjp_kernel(policy, one_route(d_x), d_weight, d_bias, one_route(d_y.const_view()), one_route(x),
                      weight.const_view());
}
}  // namespace detail

/// Vector-Jacobian product of linear:  dx = dy · weight,  d_weight += dyᵀ · x,  d_bias += Σ dy.  Returns dx (b, n, in).
template <Policy P, Viewable X, Viewable W, Viewable Y>
auto linear_vjp(const P& policy, const Y& d_y, const X& x, const W& weight,
                MatrixView<accumulate_t<typename X::value_type>> d_weight,
                VectorView<accumulate_t<typename X::value_type>> d_bias = {}) {
    TokensTensor<typename X::value_type, P> d_x(policy, x.shape());
    detail::linear_vjp_into<P, typename X::value_type>(policy, d_x.view(), d_y, x.const_view(), weight, d_weight,
                                                       d_bias);
    return d_x;
}

/// The same for an x that is not needed any more: dx takes its memory.
template <Policy P, typename Scalar, Viewable W, Viewable Y>
auto linear_vjp(const P& policy, const Y& d_y, TokensTensor<Scalar, P>&& x, const W& weight,
                MatrixView<accumulate_t<Scalar>> d_weight, VectorView<accumulate_t<Scalar>> d_bias = {}) {
    detail::linear_vjp_into<P, Scalar>(policy, x.view(), d_y, x.const_view(), weight, d_weight, d_bias);
    return std::move(x);
}

}  // namespace colt5
