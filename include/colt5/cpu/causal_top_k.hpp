// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <colt5/cpu/parallel.hpp>
#include <colt5/op/causal_top_k.hpp>

namespace colt5 {

namespace cpu {

/// The price of converged coordinate descent for logits whose `top` largest are sorted, largest first, before `count` −
/// `top` others: the scores min(1, e^((s + a) / ε)) add up to k < count, and k < top.
template <typename T>
T price_of(const T* logits, Index top, Index count, T k, T eps) {
    const auto ratio = [&](T s, T of) { return s == of ? T(1) : std::exp((s - of) / eps); };
    // below[m]: Σ over i ≥ m of e^((s_i − s_m) / ε)
    T* const below = thread_scratch<T, struct SumsBelow>(top);
    T sum = 1;
    for (Index i = top; i < count; ++i) sum += ratio(logits[i], logits[top - 1]);
    below[top - 1] = sum;
    for (Index m = top - 1; m-- > 0;) below[m] = 1 + below[m + 1] * ratio(logits[m + 1], logits[m]);
    // The m largest have score 1: m is the least number with which the next score, (k − m) / below[m], is at most 1.
    Index m = 0;
    while (m + 1 < top && !(k - static_cast<T>(m) <= below[m])) ++m;
    return eps * std::log((k - static_cast<T>(m)) / below[m]) - logits[m];
}

/// The logit that a token of a block must reach to be a candidate, and the price of scores (see causal_top_k).
template <typename T>
struct CausalPrice {
    T threshold = -std::numeric_limits<T>::infinity(), price = std::numeric_limits<T>::infinity();

    /// `history` (count) are the logits before the block, which this sorts.
    CausalPrice(const CausalTopK& how, T* history, Index count) {
        if (count == 0) return;
        const auto before = [](T a, T b) { return LogitRank<T>::of(a) < LogitRank<T>::of(b); };
        const Index chosen = how.share(count);
        const double k = how.rate * static_cast<double>(count) * how.fetch_k_ratio;
        const Index top = std::min(count, std::max(chosen, static_cast<Index>(k) + 1));
        std::partial_sort(history, history + top, history + count, before);
        threshold = history[chosen - 1];
        if (std::isnan(history[0]))
            price = history[0];
        else if (k >= static_cast<double>(count))
            price = -*std::max_element(history, history + count, before);
        else
            price = price_of(history, top, count, static_cast<T>(k), static_cast<T>(how.eps));
    }
};

/// Threshold and price of one block, and how many of its tokens are candidates and how many are real.
template <typename T>
struct CausalBlock : CausalPrice<T> {
    Index candidates = 0, real = 0;

    CausalBlock(const CausalTopK& how, const CausalBlocks& blocks, Index block, const T* logits, const bool* mask)
        : CausalPrice<T>(price_before(how, blocks, block, logits, mask)) {
        const auto least = LogitRank<T>::of(this->threshold);
        for (Index i = blocks.begin(block); i < blocks.end(block); ++i)
            if (mask == nullptr || mask[i]) {
                ++real;
                candidates += LogitRank<T>::of(logits[i]) <= least;
            }
    }

private:
    static CausalPrice<T> price_before(const CausalTopK& how, const CausalBlocks& blocks, Index block, const T* logits,
                                       const bool* mask) {
        T* const history = thread_scratch<T, struct History>(how.block_size);
        Index count = 0;
        for (Index i = blocks.history(block); i < blocks.begin(block); ++i)
            if (mask == nullptr || mask[i]) history[count++] = logits[i];
        return {how, history, count};
    }
};

}  // namespace cpu

template <typename T>
void causal_top_k_kernel(const Cpu& policy, const CausalTopK& how, const CausalBlocks& blocks,
                         TokensView<TokenIndex> indices, TokensView<T> scores, TokensView<T> slopes,
                         TokensView<bool> live, TokensView<const T> logits, Mask mask) {
    using Rank = LogitRank<T>;
    const Index routes = logits.extent(1), rows = logits.extent(0) * routes, count = blocks.count(),
                picks = indices.extent(2);
    if (rows == 0 || picks == 0) return;
    const auto logits_of = [&](Index row) { return logits[row / routes][row % routes].data(); };
    const auto mask_of = [&](Index row) { return mask ? mask[row / routes].data() : nullptr; };

    MatrixTensor<T, Cpu> thresholds(policy, {rows, count}), prices(policy, {rows, count});
    MatrixTensor<TokenIndex, Cpu> candidates(policy, {rows, count}), reals(policy, {rows, count});
    parallel_for(policy, rows * count, [&](Index i) {
        const cpu::CausalBlock<T> block(how, blocks, i % count, logits_of(i / count), mask_of(i / count));
        thresholds.data()[i] = block.threshold;
        prices.data()[i] = block.price;
        candidates.data()[i] = static_cast<TokenIndex>(block.candidates);
        reals.data()[i] = static_cast<TokenIndex>(block.real);
    });
    parallel_for(policy, rows, [&](Index row) {
        const T* const s = logits_of(row);
        const bool* const real = mask_of(row);
        TokenIndex* const taken = candidates.data() + row * count;
        CausalBudget budget(how, picks);
        Index all_taken = 0;
        for (Index j = 0; j < count; ++j) {
            taken[j] = static_cast<TokenIndex>(budget.take(taken[j], reals.data()[row * count + j]));
            all_taken += taken[j];
        }
        const auto set = [&](Index pick, Index token, bool is_live, T score, T slope) {
            indices.data()[row * picks + pick] = static_cast<TokenIndex>(token);
            live.data()[row * picks + pick] = is_live;
            scores.data()[row * picks + pick] = score;
            slopes.data()[row * picks + pick] = slope;
        };
        for (Index j = 0, chosen = 0, other = all_taken; j < count; ++j) {
            const auto least = Rank::of(thresholds.data()[row * count + j]);
            Index left = taken[j];
            for (Index i = blocks.begin(j); i < blocks.end(j) && (left > 0 || other < picks); ++i)
                if (left > 0 && (real == nullptr || real[i]) && Rank::of(s[i]) <= least) {
                    const ScoreAtPrice<T> at(s[i], prices.data()[row * count + j], how.eps);
                    set(chosen++, i, true, how.value_of(at.score), at.slope);
                    --left;
                } else if (other < picks) {
                    set(other++, i, false, T(0), T(0));
                }
        }
    });
}

}  // namespace colt5
