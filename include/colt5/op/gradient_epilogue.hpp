// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstddef>

#include <colt5/core/tensor.hpp>

namespace colt5 {

/// A rank-one update of the gradient of tokens x, and the gradient of its vector t:
///
///     d_x[b, i] += scale · s[b, route, first + i] t
///     d_t       += scale · Σ s[b, route, first + i] x[b, i]
///
/// A router with logits scale · x · t adds one for each routing token t: s is the gradient of the logits.
template <typename T>
struct RankOneUpdate {
    TokensView<const accumulate_t<T>> s;  // (b, r, n)
    Index route;                          // which of the r routes of s
    VectorView<const T> t;                // (d)
    VectorView<accumulate_t<T>> d_t;      // (d)
    double scale = 1;
    Index first = 0;  // token of s that belongs to row 0 of x: where a chunk begins
};

/// The number of rank-one updates that a backend's norms can add in one pass. A backend that can add some specializes
/// it.
template <typename P>
inline constexpr std::size_t max_rank_one_updates = 0;

/// The fused epilogue of a norm's vector-Jacobian product: what is added to d_x (b, n, d) while it is written.
///
///     d_x = gradient of the norm + d_residual + Σ_r scale_r · s_r ⊗ t_r
template <typename T, Policy P, std::size_t updates = 0>
struct GradientEpilogue {
    TokensView<const T> d_residual{};  // (b, n, d) or absent: the gradient of the output, if x was added to it
    std::array<RankOneUpdate<T>, updates> rank_one{};
    Event<P> ready{};  ///< the updates' s may be read after this event

    /// Pointer to element `offset` of d_residual, or null.
    const T* d_residual_from(Index offset) const { return d_residual ? d_residual.data() + offset : nullptr; }
};

namespace detail {
/// The shapes of an epilogue for the gradient of x (b, n, d).
template <typename T, Policy P, std::size_t updates, typename X>
void check_epilogue(const GradientEpilogue<T, P, updates>& epilogue, const X& x) {
    const auto [batch, length, dim] = x.shape();
    if (epilogue.d_residual) expect_shape("d_residual", epilogue.d_residual.shape(), x.shape());
    for (const auto& update : epilogue.rank_one) {
        expect_shape("s", update.s.shape(), {batch, dynamic, dynamic});
        expect_value(is_range_of(update.route, 1, update.s.extent(1)), "route", "one of s", update.route);
        expect_value(is_range_of(update.first, length, update.s.extent(2)), "first", "a token of s", update.first);
        expect_shape("t", update.t.shape(), {dim});
        expect_shape("d_t", update.d_t.shape(), {dim});
    }
}

/// (…, d) → (1, rows, d)
template <Viewable T>
auto one_sequence(const T& tensor) {
    const auto rows = tensor.view().rows();
    return rows.reshape(std::array{Index{1}, rows.extent(0), rows.extent(1)});
}
}  // namespace detail

}  // namespace colt5
