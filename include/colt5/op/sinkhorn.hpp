// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>

#include <colt5/core/random.hpp>
#include <colt5/op/divisor.hpp>
#include <colt5/op/gather.hpp>

namespace colt5 {

template <typename P>
void sinkhorn_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `sinkhorn` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void sinkhorn_vjp_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `sinkhorn_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void gumbel_noise_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `gumbel_noise` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// Which rows of a stream of Gumbel noise the rows of a tensor are: its row i is row first + i mod distinct.
struct GumbelRows {
    Index first = 0;
    Index distinct = std::numeric_limits<Index>::max();

    COLT5_HOST_DEVICE std::uint64_t operator[](Index i) const {
        return static_cast<std::uint64_t>(first + i % distinct);
    }
};

/// The Gumbel noise of a (row, slot, token) in a stream: of 2³² rows, 2³¹ slots and 2³¹ tokens, each has its own.
COLT5_HOST_DEVICE inline double gumbel_of(const Random& random, std::uint64_t row, Index slot, Index token) {
    return random.part(row).gumbel((static_cast<std::uint64_t>(slot) << 31) + static_cast<std::uint64_t>(token));
}

/// Gumbel noise (rows, slots, n). The number of a (row, slot, token) does not depend on the other sizes, so that
/// padding a sequence leaves the noise of its tokens as it was. The number of `random`'s stream must be below 2³².
template <typename Logit, Policy P>
auto gumbel_noise(const P& policy, Random random, Index rows, Index slots, Index length, GumbelRows which = {}) {
    constexpr Index most = Index{1} << 31, most_rows = Index{1} << 32;
    expect_value(random.stream() < std::uint64_t{1} << 32, "random", "a stream below 2^32", random.stream());
    expect_value(slots <= most, "slots", "at most 2^31", slots);
    expect_value(length <= most, "length", "at most 2^31", length);
    expect_value(which.first >= 0 && which.first < most_rows, "first", "in [0, 2^32)", which.first);
    expect_value(which.distinct >= 1, "distinct", ">= 1", which.distinct);
    expect_value(std::min(rows, which.distinct) <= most_rows - which.first, "rows",
                 "at most 2^32, counted from the first row of the stream", rows);
    TokensTensor<Logit, P> noise(policy, {rows, slots, length});
    gumbel_noise_kernel(policy, noise.view(), random, which);
    return noise;
}

/// Gumbel–Sinkhorn (Mena et al. 2018; Tay et al. 2020, arXiv 2002.11296): every slot chooses one token.
struct Sinkhorn {
    int n_iters = 8;
    double temperature = 0.7;  ///< in [1e-6, 1e6]
    /// As in the reference, masked tokens take part in the normalizations with the logit of a worthless token (log
    /// 1e-20). Otherwise they take no part, and padding changes nothing.
    bool masked_tokens_take_part = false;

    void check() const {
        expect_value(n_iters >= 1, "n_iters", ">= 1", n_iters);
        expect_divisor("temperature", temperature);
    }
};

/// Logits below this count as this before their logarithm is taken.
inline constexpr double sinkhorn_floor = 1e-20;
/// And +∞ as this.
inline constexpr double sinkhorn_ceiling = std::numeric_limits<double>::max();

/// Choices and scores, and what the vector-Jacobian product reads: the potentials of every iteration, k + n numbers
/// each. These are double, as is all that is computed between logits and scores: the gradient is what remains when
/// each normalization has taken away most of it, and float would leave as few as one or two digits.
template <typename Logit, Policy P>
struct SinkhornActivations {
    Tensor<TokenIndex, P, dynamic, dynamic, dynamic> indices;               // (b, r, k)
    Tensor<Logit, P, dynamic, dynamic, dynamic> scores;                     // (b, r, k)
    Tensor<double, P, dynamic, dynamic, dynamic, dynamic> slot_potential;   // u (b, r, T, k)
    Tensor<double, P, dynamic, dynamic, dynamic, dynamic> token_potential;  // v (b, r, T, n)
};

namespace detail {
template <typename Logit>
void check_noise_and_mask(TokensView<const Logit> noise, Mask mask, const std::array<Index, 3>& logits, Index k) {
    expect_length("logits", logits[2]);
    if (noise) expect_shape("noise", noise.shape(), {logits[0] * logits[1], k, logits[2]});
    if (mask) expect_shape("mask", mask.shape(), {logits[0], logits[2]});
}
}  // namespace detail

/// With z_ij = (log max(s_j, 1e-20) + noise_ij) / temperature for slot i and token j, and v⁰ = 0:
///
///     u_i = log Σ_j exp(z_ij − v_j),   v_j = log Σ_i exp(z_ij − u_i)       n_iters times
///     P_ij = exp(z_ij − u_i − v_j)
///     index_i = argmax_j P_ij over real tokens (ties: lower index),   score_i = P_i,index_i
///
///     logits (b, r, n), noise (b · r, k, n) or absent (none), mask (b, n) or absent;  k = min(slots, n)
///
/// A row with fewer real tokens than slots has one slot for each of them, so that padding changes nothing; the slots
/// left over choose a masked token, or the last token where none is masked, and score 0. (With masked_tokens_take_part
/// only a row without any real token does so.) With slots_of_sample (b) a sample has at most so many slots. A single
/// slot gets every token: all P_ij are 1, and rounding decides what it chooses; likewise without noise, where all are
/// 1 / k. Logits of +∞ count as the largest number. A NaN among the real logits of a row makes the scores and gradients
/// of all its real tokens NaN; every slot chooses the first of them.
///
/// The reference stores the matrix of every iteration; the potentials say the same in n_iters · (k + n) numbers.
template <Policy P, Viewable L>
auto sinkhorn_forward(const P& policy, const Sinkhorn& sinkhorn, const L& logits,
                      TokensView<const typename L::value_type> noise, Mask mask, Index slots,
                      VectorView<const TokenIndex> slots_of_sample = {}) {
    using Logit = typename L::value_type;
    const auto [batch, routes, length] = logits.shape();
    sinkhorn.check();
    expect_value(slots >= 1, "slots", ">= 1", slots);
    const Index k = std::min(slots, length), steps = sinkhorn.n_iters;
    detail::check_noise_and_mask(noise, mask, {batch, routes, length}, k);
    if (slots_of_sample) expect_shape("slots_of_sample", slots_of_sample.shape(), {batch});
    SinkhornActivations<Logit, P> saved{{policy, {batch, routes, k}},
                                        {policy, {batch, routes, k}},
                                        {policy, {batch, routes, steps, k}},
                                        {policy, {batch, routes, steps, length}}};
    sinkhorn_kernel(policy, saved.indices.view(), saved.scores.view(), saved.slot_potential.view(),
                    saved.token_potential.view(), logits.const_view(), noise, mask, sinkhorn, slots_of_sample);
    return saved;
}

/// Vector-Jacobian product: the normalizations in reverse, each of them one pass over exp(z − u − v).
/// `indices` are those of forward. Returns d_logits (b, r, n). Throws ShapeError unless the saved activations are of
/// these logits and of as many iterations, and on the CPU ValueError when an index is not in [0, n).
template <Policy P, typename Logit, Viewable D, Viewable Indices, Viewable L>
auto sinkhorn_vjp(const P& policy, const Sinkhorn& sinkhorn, const SinkhornActivations<Logit, P>& saved,
                  const D& d_scores, const Indices& indices, const L& logits, TokensView<const Logit> noise, Mask mask,
                  VectorView<const TokenIndex> slots_of_sample = {}) {
    static_assert(same_scalar<decltype(saved.scores), D, L>,
                  "colt5: `d_scores` and `logits` must have the scalar type of `saved`");
    static_assert(are_indices<Indices>, "colt5: `indices` must be of TokenIndex");
    const auto [batch, routes, length] = logits.shape();
    const Index k = saved.scores.extent(2), steps = sinkhorn.n_iters;
    sinkhorn.check();
    expect_shape("saved.scores", saved.scores.shape(), {batch, routes, dynamic});
    expect_shape("saved.slot_potential", saved.slot_potential.shape(), {batch, routes, steps, k});
    expect_shape("saved.token_potential", saved.token_potential.shape(), {batch, routes, steps, length});
    expect_shape("d_scores", d_scores.shape(), saved.scores.shape());
    expect_shape("indices", indices.shape(), saved.scores.shape());
    detail::check_noise_and_mask(noise, mask, logits.shape(), k);
    if (slots_of_sample) expect_shape("slots_of_sample", slots_of_sample.shape(), {batch});
    auto d_logits = tensor_like(policy, logits);
    sinkhorn_vjp_kernel(policy, d_logits.view(), d_scores.const_view(), indices.const_view(), saved.scores.const_view(),
                        saved.slot_potential.const_view(), saved.token_potential.const_view(), logits.const_view(),
                        noise, mask, sinkhorn, slots_of_sample);
    return d_logits;
}

}  // namespace colt5
