// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/core/tensor.hpp>
#include <colt5/op/gradient_epilogue.hpp>

namespace colt5 {

template <typename P>
void layer_norm_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `layer_norm` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void layer_norm_vjp_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `layer_norm_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// The parameters of a LayerNorm, or their gradients, as operations take them that contain a norm.
template <typename T>
struct LayerNormParameters {
    VectorView<T> weight, bias;  // (d)
    /// (b, n) or absent: where it is false, what is not finite counts as 0, if the policy cleans padding as it reads
    /// (see core/policy.hpp). Other policies, whose rows are clean, ignore it.
    Mask clean_mask{};
    static constexpr std::size_t count = 2;
    std::array<VectorView<T>, count> all() const { return {weight, bias}; }
};

/// Added to the variance (torch.nn.LayerNorm's default).
inline constexpr double layer_norm_eps = 1e-5;

/// LayerNorm over the last axis:  y = (x − μ) / √(σ² + 1e-5) · weight + bias,  σ² the mean of (x − μ)²
///
///     x (…, d), weight (d), bias (d)  →  y (…, d)
template <Policy P, typename T, Viewable X>
auto normalize(const P& policy, const X& x, const LayerNormParameters<const T>& norm) {
    static_assert(same_scalar<VectorView<T>, X>, "colt5: `x` must have the scalar type of `norm`");
    expect_shape("weight", norm.weight.shape(), {x.extent(X::rank - 1)});
    expect_shape("bias", norm.bias.shape(), {x.extent(X::rank - 1)});
    auto y = tensor_like(policy, x);
    layer_norm_kernel(policy, y.view().rows(), x.const_view().rows(), norm);
    return y;
}

/// Vector-Jacobian product of LayerNorm. With r = 1 / √(σ² + 1e-5), z = (x − μ) r and h = dy ∘ weight:
///
///     dx = r · (h − mean(h) − z · mean(h ∘ z)),   d_weight += Σ dy ∘ z,   d_bias += Σ dy
///
/// The result goes to d_x (b, n, d), and what the epilogue adds. The bias is not read.
template <Policy P, typename T, Viewable DX, Viewable Y, Viewable X, std::size_t updates = 0>
void normalize_vjp(const P& policy, const DX& d_x, const Y& d_y, const X& x, const LayerNormParameters<const T>& norm,
                   const LayerNormParameters<accumulate_t<T>>& d_norm,
                   const GradientEpilogue<T, P, updates>& epilogue = {}) {
    static_assert(is_output<DX>, "colt5: `d_x` must be a view to write to, such as tensor.view()");
    static_assert(same_scalar<VectorView<T>, DX, Y, X>,
                  "colt5: `d_x`, `d_y` and `x` must have the scalar type of `norm`");
    expect_shape("d_x", d_x.shape(), x.shape());
    expect_shape("d_y", d_y.shape(), x.shape());
    expect_shape("weight", norm.weight.shape(), {x.extent(X::rank - 1)});
    expect_shape("d_weight", d_norm.weight.shape(), {x.extent(X::rank - 1)});
    expect_shape("d_bias", d_norm.bias.shape(), {x.extent(X::rank - 1)});
    detail::check_epilogue(epilogue, x);
    layer_norm_vjp_kernel(policy, d_x.view(), d_norm, d_y.const_view(), x.const_view(), norm, epilogue);
}

/// The same with the parameters alone, of any number of axes: x (…, d), weight (d), bias (d)  →  y (…, d)
template <Policy P, Viewable X, Viewable W, Viewable B>
auto layer_norm(const P& policy, const X& x, const W& weight, const B& bias) {
    static_assert(same_scalar<X, W, B>, "colt5: `weight` and `bias` must have the scalar type of `x`");
    return normalize(policy, x,
                     LayerNormParameters<const typename X::value_type>{weight.const_view(), bias.const_view()});
}
template <Policy P, Viewable DX, Viewable Y, Viewable X, Viewable W>
void layer_norm_vjp(const P& policy, const DX& d_x, const Y& d_y, const X& x, const W& weight,
                    VectorView<accumulate_t<typename X::value_type>> d_weight,
                    VectorView<accumulate_t<typename X::value_type>> d_bias) {
    static_assert(is_output<DX>, "colt5: `d_x` must be a view to write to, such as tensor.view()");
    static_assert(same_scalar<X, DX, Y, W>, "colt5: `d_x`, `d_y` and `weight` must have the scalar type of `x`");
    using T = typename X::value_type;
    expect_shape("d_x", d_x.shape(), x.shape());
    expect_shape("d_y", d_y.shape(), x.shape());
    normalize_vjp(policy, detail::one_sequence(d_x), detail::one_sequence(d_y), detail::one_sequence(x),
                  LayerNormParameters<const T>{weight.const_view(), {}},
                  LayerNormParameters<accumulate_t<T>>{d_weight, d_bias});
}

/// The same, with a d_x of its own.
template <Policy P, Viewable Y, Viewable X, Viewable W>
auto layer_norm_vjp(const P& policy, const Y& d_y, const X& x, const W& weight,
                    VectorView<accumulate_t<typename X::value_type>> d_weight,
                    VectorView<accumulate_t<typename X::value_type>> d_bias) {
    auto d_x = tensor_like(policy, x);
    layer_norm_vjp(policy, d_x.view(), d_y, x, weight, d_weight, d_bias);
    return d_x;
}

}  // namespace colt5
