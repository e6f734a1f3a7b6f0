// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <string>

#include <colt5/core/random.hpp>
#include <colt5/core/tensor.hpp>

namespace colt5 {

template <typename P>
void rotary_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `rotary` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// Where the rows of a tensor (b, n, …) stand in their sequences: row i of sequence b at indices[b, i] or, where there
/// are no indices, at first + i.
struct RowPositions {
    MatrixView<const TokenIndex> indices{};  ///< (b, n)
    Index first = 0;
};

/// The frequencies of the pairs of a head, 10000^(−2i / dim_head) for i in [0, dim_head / 2), rounded to float step by
/// step as those of the reference.
template <Policy P>
VectorTensor<float, P> rotary_frequencies(const P& policy, Index dim_head) {
    if (dim_head < 0 || dim_head % 2 != 0) expect_value(false, "dim_head", "even", dim_head);
    VectorTensor<float, P> inv_freq(policy, {dim_head / 2});
    fill_with(policy, inv_freq, [&](std::size_t i) {
        const float exponent = static_cast<float>(2 * i) / static_cast<float>(dim_head);
        return 1.0f / static_cast<float>(std::pow(10000.0, static_cast<double>(exponent)));
    });
    return inv_freq;
}

namespace detail {

/// position · inv_freq less a multiple of 2π, in [−π, π] up to rounding. For frequencies of at most 1 the error is
/// below 2e-14 for positions to 2^29, where the product is exact, and 3e-8 beyond.
COLT5_HOST_DEVICE inline double rotary_angle(double position, double inv_freq) {
    // 2π in three parts. The first two have 24 bits, so that their products with a number of turns are exact.
    constexpr double high = 0x1.921fb4p+2, middle = 0x1.4442dp-22, low = 0x1.8469898cc517p-46;
    constexpr double round = 0x1.8p52;  // x + round has no bits behind the point
    const double angle = position * inv_freq;
    const double turns = (angle * 0x1.45f306dc9c883p-3 + round) - round;
    return ((angle - turns * high) - turns * middle) - turns * low;
}

template <typename X>
void check_rotary(const X& x, Index heads, VectorView<const float> inv_freq, const RowPositions& at) {
    static_assert(is_output<X>, "colt5: `x` must be a view to write to, such as tensor.view()");
    const auto [batch, rows, groups, all_heads, dim_head] = x.shape();
    if (dim_head % 2 != 0) expect_value(false, "dim_head of x", "even", dim_head);
    expect_shape("inv_freq", inv_freq.shape(), {dim_head / 2});
    if (!is_range_of(0, heads, all_heads))
        expect_value(false, "heads", detail::concat({"in [0, ", std::to_string(all_heads), "], the heads of x"}),
                     heads);
    if (at.indices) expect_shape("positions", at.indices.shape(), {batch, rows});
    expect_value(at.first >= 0, "first", ">= 0", at.first);
    expect_length("x", at.first);
    expect_length("x", at.first + rows);
}

}  // namespace detail

/// Rotary embedding (Su et al. 2021), in place. With p = dim_head / 2 and the angle a_i = position of the row ·
/// inv_freq[i], the pairs (i, i + p) of a head are rotated:
///
///     x[i] ← x[i] cos a_i − x[i + p] sin a_i,    x[i + p] ← x[i + p] cos a_i + x[i] sin a_i
///
///     x (b, n, groups, heads of a group, dim_head): the first `heads` of every group are rotated, such as the keys of
///     keys and values; inv_freq (dim_head / 2)
///
/// The inner product of two heads then depends on the distance of their positions alone. Sine and cosine are within
/// 3e-7 in float, 1e-13 in double (positions to 2^29). Throws ShapeError when the inputs do not fit together,
/// ValueError when dim_head is odd, or a position is 2^31 or more.
template <Policy P, Viewable X>
void rotary(const P& policy, const X& x, Index heads, VectorView<const float> inv_freq, const RowPositions& at) {
    detail::check_rotary(x, heads, inv_freq, at);
    rotary_kernel(policy, x.view(), heads, inv_freq, at, false);
}

/// Vector-Jacobian product, in place: the gradient is rotated back.
template <Policy P, Viewable D>
void rotary_vjp(const P& policy, const D& d, Index heads, VectorView<const float> inv_freq, const RowPositions& at) {
    detail::check_rotary(d, heads, inv_freq, at);
    rotary_kernel(policy, d.view(), heads, inv_freq, at, true);
}

}  // namespace colt5
