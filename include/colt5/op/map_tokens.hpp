// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>

#include <colt5/op/windows.hpp>

namespace colt5 {

template <typename P>
void add_sincos_positions_kernel(const P&, ...) {
    static_assert(
        has_kernel<P>,
        "colt5: no `add_sincos_positions` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void map_mean_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `map_mean` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void map_mean_vjp_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `map_mean_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

namespace detail {
/// The frequency ω_c of add_sincos_positions, with `quarter` = d/4 ≥ 2.
COLT5_HOST_DEVICE inline double sincos_frequency(Index c, Index quarter) {
    return ::pow(10000.0, -static_cast<double>(c) / static_cast<double>(quarter - 1));
}
}  // namespace detail

/// Adds an embedding of each token's place in its map, which is not learned. With c < d/4 and
/// ω_c = 10000^(−c / (d/4 − 1)):
///
///     tokens[b, grid.token_at(y, x)] += (sin ω x, cos ω x, sin ω y, cos ω y)
///
///     tokens (b, grid.tokens(), d)
///
/// Padding tokens change, too. Angles and their functions are computed in double. The gradient of the tokens goes
/// through unchanged. Throws ValueError unless d is a multiple of 4 and at least 8.
template <Policy P, typename Scalar>
void add_sincos_positions(const P& policy, TokensView<Scalar> tokens, const WindowGrid& grid) {
    const Index dim = tokens.extent(2);
    expect_shape("tokens", tokens.shape(), {tokens.extent(0), grid.tokens(), dim});
    expect_value(dim % 4 == 0 && dim >= 8, "dim", "a multiple of 4, at least 8", dim);
    add_sincos_positions_kernel(policy, tokens, grid);
}

/// The mean over the tokens of each map, without padding: tokens (b, grid.tokens(), d)  →  (b, 1, d)
template <Policy P, Viewable X>
auto map_mean(const P& policy, const X& tokens, const WindowGrid& grid) {
    using Scalar = typename X::value_type;
    expect_shape("tokens", tokens.shape(), {tokens.extent(0), grid.tokens(), tokens.extent(2)});
    expect_value(grid.height > 0 && grid.width > 0, "grid", "of a map with tokens", grid.tokens());
    TokensTensor<Scalar, P> mean(policy, {tokens.extent(0), 1, tokens.extent(2)});
    map_mean_kernel(policy, mean.view(), tokens.const_view(), grid);
    return mean;
}

/// Its vector-Jacobian product: d_mean (b, 1, d)  →  (b, grid.tokens(), d), each token its share, padding 0.
template <Policy P, Viewable D>
auto map_mean_vjp(const P& policy, const D& d_mean, const WindowGrid& grid) {
    using Scalar = typename D::value_type;
    expect_shape("d_mean", d_mean.shape(), {d_mean.extent(0), 1, d_mean.extent(2)});
    TokensTensor<Scalar, P> d_tokens(policy, {d_mean.extent(0), grid.tokens(), d_mean.extent(2)});
    map_mean_vjp_kernel(policy, d_tokens.view(), d_mean.const_view(), grid);
    return d_tokens;
}

}  // namespace colt5
