// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/core/tensor.hpp>

namespace colt5 {

template <typename P>
void look_back_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `look_back` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void look_back_vjp_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `look_back_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void look_back_counts_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `look_back_counts` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

namespace detail {
/// The windows of a sequence of `length` tokens. Throws ValueError unless it is a multiple of the window.
inline Index windows_of(const char* name, Index length, Index window) {
    expect_value(window >= 1, "window", ">= 1", window);
    expect_value(length % window == 0, name, "a multiple of the window", length);
    return length / window;
}
}  // namespace detail

/// For each window of a sequence, the rows of the window before it and its own:
///
///     x (b, m · window, d)  →  (b · m, 2 · window, d)
///
/// The first window of a sequence has none before it: its own rows come first, then zeros. So in every window the rows
/// that its i-th token may see if it sees the window before it, and its own up to itself, are the first ones, as many
/// as look_back_counts says. Throws ValueError unless the length is a multiple of the window.
template <Policy P, Viewable X>
auto look_back(const P& policy, const X& x, Index window) {
    const auto [batch, length, dim] = x.shape();
    const Index windows = detail::windows_of("length of x", length, window);
    TokensTensor<typename X::value_type, P> rows(policy, {batch * windows, 2 * window, dim});
    look_back_kernel(policy, rows.view(), x.const_view(), window);
    return rows;
}

/// Vector-Jacobian product: d_rows (b · m, 2 · window, d)  →  (b, m · window, d), for sequences of `length` tokens.
template <Policy P, Viewable D>
auto look_back_vjp(const P& policy, const D& d_rows, Index length, Index window) {
    const Index windows = detail::windows_of("length", length, window);
    const Index batch = windows == 0 ? 0 : d_rows.extent(0) / windows;
    expect_shape("d_rows", d_rows.shape(), {batch * windows, 2 * window, dynamic});
    TokensTensor<typename D::value_type, P> d_x(policy, {batch, length, d_rows.extent(2)});
    look_back_vjp_kernel(policy, d_x.view(), d_rows.const_view(), window);
    return d_x;
}

/// How many of these rows each token sees (b · m, 1, window), for FirstKeys: i + 1 for the i-th token of the first
/// window of a sequence of m windows, window + i + 1 in the others.
template <Policy P>
TokensTensor<TokenIndex, P> look_back_counts(const P& policy, Index batch, Index windows, Index window) {
    expect_length("rows", 2 * window);
    TokensTensor<TokenIndex, P> counts(policy, {batch * windows, 1, window});
    look_back_counts_kernel(policy, counts.view(), windows);
    return counts;
}

}  // namespace colt5
