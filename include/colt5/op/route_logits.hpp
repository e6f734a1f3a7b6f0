// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <concepts>
#include <type_traits>

#include <colt5/core/tensor.hpp>
#include <colt5/expr/expr.hpp>
#include <colt5/op/zero.hpp>

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

template <typename P>
void cosine_logits_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `cosine_logits` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void cosine_logits_vjp_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `cosine_logits_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

namespace detail {
/// Routing tokens of one sample each (b, r, d), or of all samples (r, d).
template <typename R>
inline constexpr bool is_of_samples = R::rank == 3;

/// Throws ShapeError unless routing tokens are (r, d), or (b, r, d) with the b of x (b, n, d). Returns r.
template <Viewable X, Viewable R>
Index count_of_routes(const X& x, const R& routing_token) {
    if constexpr (is_of_samples<R>)
        expect_shape("routing_token", routing_token.shape(), {x.extent(0), dynamic, x.extent(2)});
    else
        expect_shape("routing_token", routing_token.shape(), {dynamic, x.extent(2)});
    return routing_token.extent(R::rank - 2);
}
}  // namespace detail

/// How well each token matches each routing token:  s[b, r, i] = scale · x[b, i] · routing_token[r]
///
///     x (b, n, d), routing_token (r, d)  →  s (b, r, n), in float or double whatever x is
///
/// Or each sample has routing tokens of its own, routing_token (b, r, d); then there is one pass for each sample.
template <Policy P, Viewable X, Viewable R>
auto route_logits(const P& policy, const X& x, const R& routing_token, double scale = 1) {
    using Logit = accumulate_t<typename X::value_type>;
    static_assert(same_scalar<X, R>, "colt5: `routing_token` must have the scalar type of `x`");
    const Index routes = detail::count_of_routes(x, routing_token);
    Tensor<Logit, P, dynamic, dynamic, dynamic> logits(policy, {x.extent(0), routes, x.extent(1)});
    if constexpr (detail::is_of_samples<R>) {
        for (Index b = 0; b < x.extent(0); ++b)
            route_logits_kernel(policy, logits.view().range(b, 1), x.const_view().range(b, 1),
                                routing_token.const_view()[b], static_cast<Logit>(scale));
    } else {
        route_logits_kernel(policy, logits.view(), x.const_view(), routing_token.const_view(),
                            static_cast<Logit>(scale));
    }
    return logits;
}

namespace detail {
/// The gradient of routing tokens (r, d), or (b, r, d) where each sample has its own.
template <typename X, typename R>
using RoutingTokenGradient = std::conditional_t<is_of_samples<R>, TokensView<accumulate_t<typename X::value_type>>,
                                                MatrixView<accumulate_t<typename X::value_type>>>;
}  // namespace detail

/// Vector-Jacobian product of route_logits. A router shares its input with other branches, so d_x accumulates too:
///
///     d_x[b, i] += scale · Σ_r ds[b, r, i] routing_token[r],   d_routing_token[r] += scale · Σ ds[b, r, i] x[b, i]
///
/// On policies that clean padding as they read (see core/policy.hpp), tokens with ds = 0 are not read.
template <Policy P, Viewable S, Viewable X, Viewable R>
void route_logits_vjp(const P& policy, TokensView<typename X::value_type> d_x,
                      detail::RoutingTokenGradient<X, R> d_routing_token, const S& d_logits, const X& x,
                      const R& routing_token, double scale = 1) {
    static_assert(same_scalar<X, R>, "colt5: `routing_token` must have the scalar type of `x`");
    static_assert(std::same_as<typename S::value_type, accumulate_t<typename X::value_type>>,
                  "colt5: `d_logits` must have the scalar type of the logits");
    const Index routes = detail::count_of_routes(x, routing_token);
    expect_shape("d_logits", d_logits.shape(), {x.extent(0), routes, x.extent(1)});
    expect_shape("d_x", d_x.shape(), x.shape());
    expect_shape("d_routing_token", d_routing_token.shape(), routing_token.shape());
    if constexpr (detail::is_of_samples<R>) {
        for (Index b = 0; b < x.extent(0); ++b)
            route_logits_vjp_kernel(policy, d_x.range(b, 1), d_routing_token[b], d_logits.const_view().range(b, 1),
                                    x.const_view().range(b, 1), routing_token.const_view()[b],
                                    static_cast<typename S::value_type>(scale));
    } else {
        route_logits_vjp_kernel(policy, d_x, d_routing_token, d_logits.const_view(), x.const_view(),
                                routing_token.const_view(), static_cast<typename S::value_type>(scale));
    }
}

/// The norm of a token in cosine_logits is at least this.
inline constexpr double cosine_norm_floor = 1e-12;

/// The logits, and what the vector-Jacobian product reads besides.
template <typename Logit, Policy P>
struct CosineLogits {
    TokensTensor<Logit, P> logits;  // (b, r, n)
    MatrixTensor<Logit, P> norms;   // (b, n): max(‖x‖, cosine_norm_floor)
};

namespace detail {
/// max(‖t‖, cosine_norm_floor) of each routing token: (1, r), or (b, r) where each sample has its own
template <Policy P, Viewable R>
auto routing_token_norms(const P& policy, const R& routing_token) {
    using Logit = accumulate_t<typename R::value_type>;
    MatrixTensor<Logit, P> norms(
        policy, {is_of_samples<R> ? routing_token.extent(0) : Index{1}, routing_token.extent(R::rank - 2)});
    assign(policy, norms.view().reshape(std::array{norms.size()}),
           max(row_norm(routing_token), static_cast<Logit>(cosine_norm_floor)));
    return norms;
}
}  // namespace detail

/// How well the direction of each token matches that of each routing token, in [−scale, scale]:
///
///     s[b, r, i] = scale · x[b, i] · t[r] / (max(‖x[b, i]‖, 1e-12) · max(‖t[r]‖, 1e-12))
///
///     x (b, n, d), routing_token t (r, d)  →  s (b, r, n), norms (b, n), in float or double whatever x is
///
/// One pass over x. Routing tokens may be those of samples, as in route_logits.
template <Policy P, Viewable X, Viewable R>
auto cosine_logits(const P& policy, const X& x, const R& routing_token, double scale) {
    using Logit = accumulate_t<typename X::value_type>;
    static_assert(same_scalar<X, R>, "colt5: `routing_token` must have the scalar type of `x`");
    const Index routes = detail::count_of_routes(x, routing_token);
    CosineLogits<Logit, P> result{{policy, {x.extent(0), routes, x.extent(1)}}, {policy, {x.extent(0), x.extent(1)}}};
    const auto token_norms = detail::routing_token_norms(policy, routing_token);
    if constexpr (detail::is_of_samples<R>) {
        for (Index b = 0; b < x.extent(0); ++b)
            cosine_logits_kernel(policy, result.logits.view().range(b, 1), result.norms.view().range(b, 1),
                                 x.const_view().range(b, 1), routing_token.const_view()[b], token_norms.const_view()[b],
                                 static_cast<Logit>(scale));
    } else {
        cosine_logits_kernel(policy, result.logits.view(), result.norms.view(), x.const_view(),
                             routing_token.const_view(), token_norms.const_view()[0], static_cast<Logit>(scale));
    }
    return result;
}

/// Vector-Jacobian product of cosine_logits, through both norms; accumulates as that of route_logits. With x̂ = x / ‖x‖
/// and t̂ = t / ‖t‖:
///
///     d_x[b, i] += Σ_r ds[b, r, i] (scale · t̂[r] − s[b, r, i] x̂[b, i]) / ‖x[b, i]‖
///     d_t[r]    += Σ ds[b, r, i] (scale · x̂[b, i] − s[b, r, i] t̂[r]) / ‖t[r]‖
///
/// where ‖·‖ stands for max(‖·‖, 1e-12), and the terms with s are left out where the norm is at most 1e-12. Tokens with
/// ds = 0 are not read.
template <Policy P, Viewable S, Viewable X, Viewable R>
void cosine_logits_vjp(const P& policy, TokensView<typename X::value_type> d_x,
                       detail::RoutingTokenGradient<X, R> d_routing_token, const S& d_logits,
                       TokensView<const accumulate_t<typename X::value_type>> logits,
                       MatrixView<const accumulate_t<typename X::value_type>> norms, const X& x, const R& routing_token,
                       double scale) {
    using Logit = accumulate_t<typename X::value_type>;
    static_assert(same_scalar<X, R>, "colt5: `routing_token` must have the scalar type of `x`");
    static_assert(std::same_as<typename S::value_type, Logit>,
                  "colt5: `d_logits` must have the scalar type of the logits");
    const Index routes = detail::count_of_routes(x, routing_token);
    expect_shape("d_logits", d_logits.shape(), {x.extent(0), routes, x.extent(1)});
    expect_shape("logits", logits.shape(), d_logits.shape());
    expect_shape("norms", norms.shape(), {x.extent(0), x.extent(1)});
    expect_shape("d_x", d_x.shape(), x.shape());
    expect_shape("d_routing_token", d_routing_token.shape(), routing_token.shape());
    const auto token_norms = detail::routing_token_norms(policy, routing_token);
    TokensTensor<Logit, P> across(policy, {token_norms.extent(0), routes, x.extent(2)});  // Σ ds · scale · x̂ / ‖t‖
    set_zero(policy, across);
    const auto of_samples = [&](Index first, Index count, const auto& token, Index at) {
        cosine_logits_vjp_kernel(policy, d_x.range(first, count), across.view()[at],
                                 d_logits.const_view().range(first, count), logits.range(first, count),
                                 norms.range(first, count), x.const_view().range(first, count), token,
                                 token_norms.const_view()[at], static_cast<Logit>(scale));
    };
    if constexpr (detail::is_of_samples<R>)
        for (Index b = 0; b < x.extent(0); ++b) of_samples(b, 1, routing_token.const_view()[b], b);
    else
        of_samples(0, x.extent(0), routing_token.const_view(), 0);
    const auto as_token = across.view().reshape(routing_token.shape());
    const auto token_norm = column(token_norms.view().reshape(std::array{token_norms.size()}));
    const auto along = row_sum(as_token * routing_token) / token_norm / token_norm;
    const auto above_floor = token_norm > static_cast<Logit>(cosine_norm_floor);
    assign(policy, d_routing_token, d_routing_token + as_token - select(above_floor, along, Logit(0)) * routing_token);
}

}  // namespace colt5
