// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/core/tensor.hpp>
#include <colt5/op/gradient_epilogue.hpp>

namespace colt5 {

template <typename P>
void rms_norm_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `rms_norm` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void rms_norm_vjp_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `rms_norm_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// The parameter of an RMSNorm, or its gradient, as operations take it that contain a norm.
template <typename T>
struct RMSNormParameters {
    VectorView<T> gamma;  // (d)
    /// (b, n) or absent: where it is false, what is not finite counts as 0, if the policy cleans padding as it reads
    /// (see core/policy.hpp). Other policies, whose rows are clean, ignore it.
    Mask clean_mask{};
    static constexpr std::size_t count = 1;
    std::array<VectorView<T>, count> all() const { return {gamma}; }
};

/// The norm is never taken to be smaller than this (torch.nn.functional.normalize).
inline constexpr double rms_norm_floor = 1e-12;

/// RMSNorm over the last axis:  y = x / max(‖x‖₂, 1e-12) · √d · gamma
///
///     x (…, d), gamma (d)  →  y (…, d)
template <Policy P, typename T, Viewable X>
auto normalize(const P& policy, const X& x, const RMSNormParameters<const T>& norm) {
    static_assert(same_scalar<VectorView<T>, X>, "colt5: `x` must have the scalar type of `norm`");
    expect_shape("gamma", norm.gamma.shape(), {x.extent(X::rank - 1)});
    auto y = tensor_like(policy, x);
    rms_norm_kernel(policy, y.view().rows(), x.const_view().rows(), norm);
    return y;
}

/// Vector-Jacobian product of RMSNorm. With s = √d / max(‖x‖, 1e-12) and h = dy ∘ gamma:
///
///     dx = s · (h − x · (h·x) / ‖x‖²)          (without the second term where ‖x‖ is below the floor)
///     d_gamma += Σ dy ∘ x · s
///
/// The result goes to d_x (b, n, d), and what the epilogue adds.
template <Policy P, typename T, Viewable DX, Viewable Y, Viewable X, std::size_t updates = 0>
void normalize_vjp(const P& policy, const DX& d_x, const Y& d_y, const X& x, const RMSNormParameters<const T>& norm,
                   const RMSNormParameters<accumulate_t<T>>& d_norm,
                   const GradientEpilogue<T, P, updates>& epilogue = {}) {
    static_assert(is_output<DX>, "colt5: `d_x` must be a view to write to, such as tensor.view()");
    static_assert(same_scalar<VectorView<T>, DX, Y, X>,
                  "colt5: `d_x`, `d_y` and `x` must have the scalar type of `norm`");
    expect_shape("d_x", d_x.shape(), x.shape());
    expect_shape("d_y", d_y.shape(), x.shape());
    expect_shape("gamma", norm.gamma.shape(), {x.extent(X::rank - 1)});
    expect_shape("d_gamma", d_norm.gamma.shape(), {x.extent(X::rank - 1)});
    detail::check_epilogue(epilogue, x);
    rms_norm_vjp_kernel(policy, d_x.view(), d_norm, d_y.const_view(), x.const_view(), norm, epilogue);
}

/// The same with the parameter alone, of any number of axes: x (…, d), gamma (d)  →  y (…, d)
template <Policy P, Viewable X, Viewable Gamma>
auto rms_norm(const P& policy, const X& x, const Gamma& gamma) {
    static_assert(same_scalar<X, Gamma>, "colt5: `gamma` must have the scalar type of `x`");
    return normalize(policy, x, RMSNormParameters<const typename X::value_type>{gamma.const_view()});
}
template <Policy P, Viewable DX, Viewable Y, Viewable X, Viewable Gamma>
void rms_norm_vjp(const P& policy, const DX& d_x, const Y& d_y, const X& x, const Gamma& gamma,
                  VectorView<accumulate_t<typename X::value_type>> d_gamma) {
    static_assert(is_output<DX>, "colt5: `d_x` must be a view to write to, such as tensor.view()");
    static_assert(same_scalar<X, DX, Y, Gamma>, "colt5: `d_x`, `d_y` and `gamma` must have the scalar type of `x`");
    using T = typename X::value_type;
    expect_shape("d_x", d_x.shape(), x.shape());
    expect_shape("d_y", d_y.shape(), x.shape());
    normalize_vjp(policy, detail::one_sequence(d_x), detail::one_sequence(d_y), detail::one_sequence(x),
                  RMSNormParameters<const T>{gamma.const_view()}, RMSNormParameters<accumulate_t<T>>{d_gamma});
}

/// The same, with a d_x of its own.
template <Policy P, Viewable Y, Viewable X, Viewable Gamma>
auto rms_norm_vjp(const P& policy, const Y& d_y, const X& x, const Gamma& gamma,
                  VectorView<accumulate_t<typename X::value_type>> d_gamma) {
    auto d_x = tensor_like(policy, x);
    rms_norm_vjp(policy, d_x.view(), d_y, x, gamma, d_gamma);
    return d_x;
}

}  // namespace colt5
