// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstddef>

#include <colt5/core/tensor.hpp>
#include <colt5/expr/expr.hpp>

namespace colt5 {

/// One routing token's share in the gradient of tokens x that its router has in common with other branches:
///
///     d_x[b, i] += scale · d_logits[b, route, first + i] token
///     d_token   += scale · Σ d_logits[b, route, first + i] x[b, i]
template <typename T>
struct RouteGradient {
    TokensView<const accumulate_t<T>> d_logits;  // (b, r, n)
    Index route;                                 // of the r
    VectorView<const T> token;                   // (d)
    VectorView<accumulate_t<T>> d_token;         // (d)
    double scale = 1;
    Index first = 0;
};

/// How many RouteGradients a light branch adds to the gradient of its tokens in its last pass over them. Policies that
/// can do so specialize it.
template <typename P>
inline constexpr std::size_t most_routes_on_the_way = 0;

/// What else goes to the gradient of a light branch's tokens, which other branches share. Its last pass adds it.
template <typename T, Policy P, std::size_t routes = 0>
struct SharedGradient {
    TokensView<const T> add{};  // (b, n, d), such as a residual's, or absent
    std::array<RouteGradient<T>, routes> of_routes{};
    Beside<P>* beside = nullptr;  // where d_logits are computed, if anywhere, up to its mark

    void wait() const {
        if (beside != nullptr) beside->wait_for_mark();
    }
};

namespace detail {
/// What is added to the gradient of these tokens (b, n, d).
template <typename T, Policy P, std::size_t routes, typename X>
void check_shared_gradient(const SharedGradient<T, P, routes>& shared, const X& x) {
    const auto [batch, length, dim] = x.shape();
    if (shared.add) expect_shape("add", shared.add.shape(), x.shape());
    for (const auto& route : shared.of_routes) {
        expect_shape("d_logits", route.d_logits.shape(), {batch, dynamic, dynamic});
        expect_value(is_range_of(route.route, 1, route.d_logits.extent(1)), "route", "one of d_logits", route.route);
        expect_value(is_range_of(route.first, length, route.d_logits.extent(2)), "first", "a token of d_logits",
                     route.first);
        expect_shape("token", route.token.shape(), {dim});
        expect_shape("d_token", route.d_token.shape(), {dim});
    }
}
}  // namespace detail

/// For any policy: a norm's vector-Jacobian product to d_x (b, n, d), then what else goes there. A policy that can add
/// it on the way overloads this.
template <Policy P, typename T, typename Norm, typename NormGradients, std::size_t routes>
void normalize_vjp_kernel(const P& policy, TokensView<T> d_x, const NormGradients& d_norm, TokensView<const T> d_y,
                          TokensView<const T> x, const Norm& norm, const SharedGradient<T, P, routes>& shared) {
    static_assert(routes == 0, "colt5: this policy adds no routes on the way");
    normalize_vjp(policy, d_x, d_y, x, norm, d_norm);
    if (shared.add) assign(policy, d_x, d_x + shared.add);
}

}  // namespace colt5
