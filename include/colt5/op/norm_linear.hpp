// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/op/gradient_epilogue.hpp>
#include <colt5/op/layer_norm.hpp>
#include <colt5/op/linear.hpp>
#include <colt5/op/rms_norm.hpp>

namespace colt5 {

/// Where a linear map of normalized tokens goes:  y = norm(x) · weightᵀ + bias
template <typename T>
struct Projection {
    TokensView<T> y;             // (b, n, out)
    MatrixView<const T> weight;  // (out, in)
    VectorView<const T> bias{};  // (out) or absent
};

template <typename P>
void norm_linear_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `norm_linear` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void norm_linear_vjp_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `norm_linear_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// Linear maps of normalized tokens, each to a place of its own:  y = norm(x) · weightᵀ + bias
///
///     x (b, n, in), norm: LayerNormParameters or RMSNormParameters of (in)
template <Policy P, Viewable X, typename Norm, std::size_t Count>
void norm_linear(const P& policy, const X& x, const Norm& norm,
                 const std::array<Projection<typename X::value_type>, Count>& projections) {
    const auto [batch, length, in] = x.shape();
    for (const auto& parameter : norm.all()) expect_shape("norm", parameter.shape(), {in});
    for (const auto& [y, weight, bias] : projections) {
        expect_shape("weight", weight.shape(), {dynamic, in});
        expect_shape("y", y.shape(), {batch, length, weight.extent(0)});
        if (bias) expect_shape("bias", bias.shape(), {weight.extent(0)});
    }
    norm_linear_kernel(policy, projections, x.const_view(), norm);
}

/// One of them, to a new tensor (b, n, out).
template <Policy P, Viewable X, typename Norm, Viewable W>
auto norm_linear(const P& policy, const X& x, const Norm& norm, const W& weight,
                 VectorView<const typename X::value_type> bias = {}) {
    static_assert(same_scalar<X, W>, "colt5: `weight` must have the scalar type of `x`");
    using Scalar = typename X::value_type;
    TokensTensor<Scalar, P> y(policy, {x.extent(0), x.extent(1), weight.extent(0)});
    norm_linear(policy, x, norm, std::array{Projection<Scalar>{y.view(), weight.const_view(), bias}});
    return y;
}

/// Vector-Jacobian product of norm_linear, to d_x (b, n, in): linear_vjp, then normalize_vjp with its epilogue, whose
/// d_residual must not overlap d_x. The gradients of the parameters accumulate.
template <Policy P, Viewable DX, Viewable Y, Viewable X, typename Norm, typename NormGradients, Viewable W,
          std::size_t updates = 0>
void norm_linear_vjp(const P& policy, const DX& d_x, const Y& d_y, const X& x, const Norm& norm, const W& weight,
                     const NormGradients& d_norm, MatrixView<accumulate_t<typename X::value_type>> d_weight,
                     VectorView<accumulate_t<typename X::value_type>> d_bias = {},
                     const GradientEpilogue<typename X::value_type, P, updates>& epilogue = {}) {
    static_assert(is_output<DX>, "colt5: `d_x` must be a view to write to, such as tensor.view()");
    static_assert(same_scalar<X, DX, Y, W>, "colt5: `d_x`, `d_y` and `weight` must have the scalar type of `x`");
    const auto [batch, length, in] = x.shape();
    for (const auto& parameter : norm.all()) expect_shape("norm", parameter.shape(), {in});
    for (const auto& gradient : d_norm.all()) expect_shape("d_norm", gradient.shape(), {in});
    expect_shape("d_x", d_x.shape(), x.shape());
    expect_shape("weight", weight.shape(), {dynamic, in});
    expect_shape("d_y", d_y.shape(), {batch, length, weight.extent(0)});
    expect_shape("d_weight", d_weight.shape(), weight.shape());
    if (d_bias) expect_shape("d_bias", d_bias.shape(), {weight.extent(0)});
    detail::check_epilogue(epilogue, x);
    norm_linear_vjp_kernel(policy, d_x.view(), d_norm, d_weight, d_bias, d_y.const_view(), x.const_view(), norm,
                           weight.const_view(), epilogue);
}

}  // namespace colt5
