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

template <typename P>
void window_prefixes_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `window_prefixes` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

template <typename P>
void window_prefixes_vjp_kernel(const P&, ...) {
    static_assert(
        has_kernel<P>,
        "colt5: no `window_prefixes_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

template <typename P>
void window_keys_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `window_keys` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void window_keys_vjp_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `window_keys_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

namespace detail {
/// The number of windows of a sequence of `length` tokens. Throws ValueError unless it is a multiple of the window.
inline Index windows_of(const char* name, Index length, Index window) {
    expect_value(window >= 1, "window", ">= 1", window);
    expect_value(length % window == 0, name, "a multiple of the window", length);
    return length / window;
}
inline void expect_window_rows(Index first, Index rows, Index all) {
    if (!is_range_of(first, rows, all))
        expect_value(false, "first", "such that [first, first + rows) is within the s · n / window rows", first);
}
}  // namespace detail

/// For each window of a sequence, the rows of the window before it, then its own:
///
///     x (b, m · window, d)  →  (b · m, 2 · window, d)
///
/// The first window of a sequence has none before it: its own rows come first, then zeros. A token sees the window
/// before its own, and its own window up to itself. These are always the first rows, as many as look_back_counts says.
/// Throws ValueError unless the length is a multiple of the window.
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

/// The logits of sequences, repeated for each window, and a mask of the tokens before the window.
template <typename T, Policy P>
struct WindowPrefixes {
    TokensTensor<T, P> logits;               // (rows, 1, n)
    Tensor<bool, P, dynamic, dynamic> mask;  // (rows, n)
};

/// Repeats each row of logits (s, n) for each of its n / window windows. Of these s · n / window rows, returns those in
/// [first, first + rows). Row i of the s · n / window rows is window w = i mod (n / window) of its sequence; its mask
/// is true for the w · window tokens before that window. Throws ValueError unless n is a multiple of the window and
/// there are such rows.
template <Policy P, Viewable L>
auto window_prefixes(const P& policy, const L& logits, Index window, Index first, Index rows) {
    using T = typename L::value_type;
    const Index length = logits.extent(1), windows = detail::windows_of("length of logits", length, window);
    detail::expect_window_rows(first, rows, logits.extent(0) * windows);
    WindowPrefixes<T, P> prefixes{{policy, {rows, 1, length}}, {policy, {rows, length}}};
    window_prefixes_kernel(policy, prefixes.logits.view(), prefixes.mask.view(), logits.const_view(), window, first);
    return prefixes;
}

/// Vector-Jacobian product, added to d_logits (s, n): each sequence gets the sum of its rows of d_rows (rows, 1, n), in
/// their order. Throws ShapeError for rows of another length, and ValueError as window_prefixes does.
template <Policy P, typename T>
void window_prefixes_vjp(const P& policy, MatrixView<T> d_logits, TokensView<const T> d_rows, Index window,
                         Index first) {
    const Index length = d_logits.extent(1), windows = detail::windows_of("length of d_logits", length, window);
    expect_shape("d_rows", d_rows.shape(), {dynamic, 1, length});
    detail::expect_window_rows(first, d_rows.extent(0), d_logits.extent(0) * windows);
    window_prefixes_vjp_kernel(policy, d_logits, d_rows, window, first);
}

/// The keys chosen for windows among the tokens before them, after a null key.
template <typename T, Policy P>
struct KeysOfWindows {
    TokensTensor<TokenIndex, P> indices;  // (rows, 1, k + 1): `null`, then those of the picks
    TokensTensor<T, P> scores;            // (rows, 1, k + 1): 1, then those of the picks
    TokensTensor<bool, P> mask;           // (rows, 1, k + 1): true, then whether a pick is before its window
};

/// Adds the null key, whose index is `null`, to picks: indices and scores (rows, 1, k), for the rows of
/// window_prefixes(…, window, first, rows) and sequences of `windows` windows. Throws ShapeError for other shapes.
template <Policy P, typename T>
KeysOfWindows<T, P> window_keys(const P& policy, TokensView<const TokenIndex> indices, TokensView<const T> scores,
                                Index windows, Index window, Index first, Index null) {
    expect_shape("indices", indices.shape(), {dynamic, 1, dynamic});
    expect_shape("scores", scores.shape(), indices.shape());
    expect_length("null", null);
    expect_value(windows >= 1, "windows", ">= 1", windows);
    expect_value(window >= 1, "window", ">= 1", window);
    expect_value(first >= 0, "first", ">= 0", first);
    const std::array<Index, 3> shape{indices.extent(0), 1, indices.extent(2) + 1};
    KeysOfWindows<T, P> keys{{policy, shape}, {policy, shape}, {policy, shape}};
    window_keys_kernel(policy, keys.indices.view(), keys.scores.view(), keys.mask.view(), indices, scores, windows,
                       window, first, null);
    return keys;
}

/// Vector-Jacobian product: d_scores (rows, 1, k + 1)  →  (rows, 1, k)
template <Policy P, typename T>
TokensTensor<T, P> window_keys_vjp(const P& policy, TokensView<const T> d_scores) {
    expect_shape("d_scores", d_scores.shape(), {dynamic, 1, dynamic});
    expect_value(d_scores.extent(2) >= 1, "keys of d_scores", ">= 1", d_scores.extent(2));
    TokensTensor<T, P> d(policy, {d_scores.extent(0), 1, d_scores.extent(2) - 1});
    window_keys_vjp_kernel(policy, d.view(), d_scores);
    return d;
}

}  // namespace colt5
