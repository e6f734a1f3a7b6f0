// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include <colt5/core/tensor.hpp>
#include <colt5/op/divisor.hpp>
#include <colt5/op/top_k.hpp>

namespace colt5 {

template <typename P>
void causal_top_k_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `causal_top_k` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// The blocks of tokens into which causal_top_k divides a sequence. The first ones are [0, 1), [1, 2), [2, 4), [4, 8)
/// and so on; from token `size` on, a power of two, each block has `size` tokens. The last block ends with the
/// sequence. The history of a block is the `size` tokens before it, or all tokens before it if there are fewer;
/// history(block) is its first token.
///
/// Construct it on the host: in device code, nvcc drops std::countr_zero without a warning.
class CausalBlocks {
public:
    constexpr CausalBlocks(Index tokens, Index block_size)
        : length(tokens),
          size(block_size),
          doublings_(std::countr_zero(static_cast<std::uint64_t>(size))),
          count_(length > size ? doublings_ + (length + size - 1) / size
                 : length > 0  ? 1 + static_cast<Index>(std::bit_width(static_cast<std::uint64_t>(length - 1)))
                               : 0) {}

    COLT5_HOST_DEVICE Index begin(Index block) const {
        if (block > doublings_) return (block - doublings_) * size;
        return block == 0 ? 0 : Index{1} << (block - 1);
    }
    COLT5_HOST_DEVICE Index end(Index block) const { return begin(block + 1) < length ? begin(block + 1) : length; }
    COLT5_HOST_DEVICE Index history(Index block) const { return begin(block) > size ? begin(block) - size : 0; }
    COLT5_HOST_DEVICE Index count() const { return count_; }

    Index length, size;

private:
    Index doublings_, count_;
};

/// Settings of causal_top_k.
struct CausalTopK {
    double rate;                    ///< chosen tokens per token, in [1e-9, 1]
    double burst = 0;               ///< the largest budget, in tokens; 0: max(1, 2 · rate · block_size)
    Index block_size = 256;         ///< the `size` of CausalBlocks, a power of two up to 1024
    double fetch_k_ratio = 1;       ///< multiplies the k of the coordinate descent
    double eps = 1;                 ///< the ε of the descent
    bool straight_through = false;  ///< scores of chosen tokens are 1; gradients are as without it

    static constexpr Index largest_block = 1024;
    static constexpr double least_rate = 1e-9;

    /// `rate` and `burst` as integers, in units of 2⁻³² tokens, so that all backends get the same sums.
    static constexpr std::int64_t one = std::int64_t{1} << 32;
    constexpr std::int64_t rate_in_units() const { return static_cast<std::int64_t>(rate * static_cast<double>(one)); }
    constexpr std::int64_t burst_in_units() const {
        if (burst > 0) return static_cast<std::int64_t>(burst * static_cast<double>(one));
        const std::int64_t block = 2 * block_size * rate_in_units();
        return block > one ? block : one;
    }
    /// ⌈rate · count⌉
    constexpr Index share(Index count) const { return (count * rate_in_units() + one - 1) / one; }
    /// An upper bound on how many of the first `length` tokens are chosen: ⌊burst + rate · length⌋, at most `length`.
    constexpr Index capacity(Index length) const {
        if (burst_in_units() >= length * (one - rate_in_units())) return length;  // else the sum fits in 63 bits
        return (burst_in_units() + length * rate_in_units()) / one;
    }

    /// The score that a chosen token gets: with straight_through 1, unless `score` is NaN, which stays NaN.
    template <typename T>
    COLT5_HOST_DEVICE T value_of(T score) const {
        return straight_through && score == score ? T(1) : score;
    }

    friend constexpr bool operator==(const CausalTopK&, const CausalTopK&) = default;

    constexpr bool is_valid() const {
        return rate >= least_rate && rate <= 1 && burst >= 0 && burst <= 1e6 && (burst == 0 || burst >= 1) &&
               block_size >= 1 && block_size <= largest_block &&
               std::has_single_bit(static_cast<std::uint64_t>(block_size)) && fetch_k_ratio >= 1 &&
               fetch_k_ratio <= 1e6 && is_divisor(eps);
    }
};

/// How many tokens a row may still choose: its budget, in units of 2⁻³² tokens, and the number of picks left.
class CausalBudget {
public:
    COLT5_HOST_DEVICE CausalBudget(const CausalTopK& how, Index picks)
        : rate_(how.rate_in_units()), burst_(how.burst_in_units()), budget_(burst_), picks_(picks) {}

    /// Returns how many of the next block's candidates are chosen, and subtracts them. The block's `real` tokens add
    /// `rate` each to the budget of later blocks. Call it once for each block, in order.
    COLT5_HOST_DEVICE Index take(Index candidates, Index real) {
        Index taken = budget_ / CausalTopK::one;
        if (candidates < taken) taken = candidates;
        if (picks_ < taken) taken = picks_;
        picks_ -= taken;
        budget_ += real * rate_ - taken * CausalTopK::one;
        if (budget_ > burst_) budget_ = burst_;
        return taken;
    }

private:
    std::int64_t rate_, burst_, budget_;
    Index picks_;
};

/// The score of a logit s at a price a, min(1, e^((s + a) / ε)), and its derivative with respect to the logit.
template <typename T>
struct ScoreAtPrice {
    T score, slope;

    COLT5_HOST_DEVICE ScoreAtPrice(T logit, T price, double eps) : score(1), slope(0) {
        constexpr T infinity = std::numeric_limits<T>::infinity();
        // Not ∞ − ∞: the price is +∞ without a history, and may be ±∞ where the history has infinite logits.
        if ((logit == infinity && price == price) || (price == infinity && logit == logit)) return;
        const T above = logit + price;
        if (above >= T(0)) return;
        score = std::exp(above / static_cast<T>(eps));
        slope = score / static_cast<T>(eps);
    }
};

/// The result of causal_top_k. The chosen tokens of a row are its first picks, in the order of the sequence; `live` is
/// true for them. If they are fewer than k, the other picks are tokens of the sequence that were not chosen: distinct,
/// with score and slope 0.
template <typename T, Policy P>
struct CausalPicks {
    Tensor<TokenIndex, P, dynamic, dynamic, dynamic> indices;  // (b, r, k)
    Tensor<T, P, dynamic, dynamic, dynamic> scores;            // (b, r, k)
    Tensor<T, P, dynamic, dynamic, dynamic> slopes;            // (b, r, k): derivatives of the scores by their logits
    Tensor<bool, P, dynamic, dynamic, dynamic> live;           // (b, r, k)
};

/// Top-k in which the choice of a token depends only on the token and those before it. So when a sequence is continued,
/// the choices in its earlier part do not change.
///
///     logits (b, r, n), mask (b, n) or absent  →  k = min(num_tokens, capacity(n)) picks a row
///
/// The candidates of a block (see CausalBlocks) are its real tokens whose logit is at least the ⌈rate · m⌉-th largest
/// of the logits in the block's history, which has m real tokens. Ties with that logit are candidates, and so is NaN.
/// Without a history (m = 0), every real token is a candidate. Candidates are chosen in the order of the sequence, as
/// long as the row's budget lasts. The budget is `burst` at first. A chosen token costs 1; after each block, every real
/// token of the block adds `rate`, up to a budget of `burst`. So at most capacity(i) of the first i tokens are chosen,
/// for all i, and about rate · n of all if the logits keep their distribution.
///
/// The score of a chosen token is min(1, e^((s + a) / ε)), where a = −τ is the price of the history: τ is the
/// threshold that converged coordinate descent would find for it. At this price, the scores of the history's tokens
/// would add up to min(m, rate · m · fetch_k_ratio). Without a history, the score is 1. Gradients treat the price as a
/// constant, and so do not reach the logits of other tokens.
///
/// Throws ShapeError for a mask of another shape, ValueError when num_tokens < 1, n ≥ 2^31 or `how` is not valid.
template <Policy P, Viewable L>
auto causal_top_k(const P& policy, const CausalTopK& how, const L& logits, Mask mask, Index num_tokens) {
    using T = typename L::value_type;
    const auto shape = logits.shape();
    const Index batch = shape[0], routes = shape[1], length = shape[2];
    if (mask) expect_shape("mask", mask.shape(), {batch, length});
    expect_value(num_tokens >= 1, "num_tokens", ">= 1", num_tokens);
    expect_value(how.is_valid(), "how", "within the limits of CausalTopK", "something else");
    expect_length("logits", length);
    const CausalBlocks blocks{length, how.block_size};
    const std::array<Index, 3> picks{batch, routes, std::min(num_tokens, how.capacity(length))};
    CausalPicks<T, P> chosen{{policy, picks}, {policy, picks}, {policy, picks}, {policy, picks}};
    causal_top_k_kernel(policy, how, blocks, chosen.indices.view(), chosen.scores.view(), chosen.slopes.view(),
                        chosen.live.view(), logits.const_view(), mask);
    return chosen;
}

}  // namespace colt5
