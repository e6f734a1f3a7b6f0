// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/core/tensor.hpp>

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

/// The parameter of an RMSNorm, or its gradient, as operations take it that normalize on the way.
template <typename T>
struct RMSNormParameters {
    VectorView<T> gamma;  // (d)
    /// Of rows whose policy cleans padding as it reads (see op/clean_padding.hpp): (b, n), false where what is not
    /// finite counts as 0; absent on other policies, whose rows are clean.
    Mask clean_mask{};
    static constexpr std::size_t count = 1;
    std::array<VectorView<T>, count> all() const { return {gamma}; }
};

/// The norm is never taken to be smaller than this (torch.nn.functional.normalize).
inline constexpr double rms_norm_floor = 1e-12;

/// RMSNorm over the last axis:  y = x / max(‖x‖₂, 1e-12) · √d · gamma
///
///     x (…, d), gamma (d)  →  y (…, d)
template <Policy P, Viewable X, Viewable Gamma>
auto rms_norm(const P& policy, const X& x, const Gamma& gamma) {
    static_assert(same_scalar<X, Gamma>, "colt5: `gamma` must have the scalar type of `x`");
    expect_shape("gamma", gamma.shape(), {x.extent(X::rank - 1)});
    auto y = tensor_like(policy, x);
    rms_norm_kernel(policy, y.view().rows(), x.const_view().rows(), gamma.const_view());
    return y;
}

/// Vector-Jacobian product of rms_norm. With s = √d / max(‖x‖, 1e-12) and h = dy ∘ gamma:
///
///     dx = s · (h − x · (h·x) / ‖x‖²)          (without the second term where ‖x‖ is below the floor)
///     d_gamma += Σ dy ∘ x · s
///
/// The result goes to d_x (…, d).
template <Policy P, Viewable DX, Viewable Y, Viewable X, Viewable Gamma>
void rms_norm_vjp(const P& policy, const DX& d_x, const Y& d_y, const X& x, const Gamma& gamma,
                  VectorView<accumulate_t<typename X::value_type>> d_gamma) {
    static_assert(same_scalar<X, DX, Y, Gamma>, "colt5: `d_x`, `d_y` and `gamma` must have the scalar type of `x`");
    expect_shape("d_x", d_x.shape(), x.shape());
    expect_shape("d_y", d_y.shape(), x.shape());
    expect_shape("gamma", gamma.shape(), {x.extent(X::rank - 1)});
    expect_shape("d_gamma", d_gamma.shape(), {x.extent(X::rank - 1)});
    rms_norm_vjp_kernel(policy, d_x.view().rows(), d_gamma, d_y.const_view().rows(), x.const_view().rows(),
                        gamma.const_view());
}

/// The same, with a d_x of its own.
template <Policy P, Viewable Y, Viewable X, Viewable Gamma>
auto rms_norm_vjp(const P& policy, const Y& d_y, const X& x, const Gamma& gamma,
                  VectorView<accumulate_t<typename X::value_type>> d_gamma) {
    auto d_x = tensor_like(policy, x);
    rms_norm_vjp(policy, d_x.view(), d_y, x, gamma, d_gamma);
    return d_x;
}

template <Policy P, typename T, Viewable X>
auto normalize(const P& policy, const X& x, const RMSNormParameters<const T>& norm) {
    auto y = tensor_like(policy, x);
    if constexpr (cleans_as_it_reads<P>)
        rms_norm_kernel(policy, y.view().rows(), x.const_view().rows(), norm.gamma, norm.clean_mask);
    else
        rms_norm_kernel(policy, y.view().rows(), x.const_view().rows(), norm.gamma);
    return y;
}
template <Policy P, typename T, Viewable DX, Viewable Y, Viewable X>
void normalize_vjp(const P& policy, const DX& d_x, const Y& d_y, const X& x, const RMSNormParameters<const T>& norm,
                   const RMSNormParameters<accumulate_t<T>>& d_norm) {
    rms_norm_vjp(policy, d_x, d_y, x, norm.gamma, d_norm.gamma);
}

}  // namespace colt5
