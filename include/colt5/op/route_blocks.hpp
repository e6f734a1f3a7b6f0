// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/core/tensor.hpp>

namespace colt5 {

template <typename P>
void block_shares_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `block_shares` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void merge_blocks_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `merge_blocks` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void pad_sequences_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `pad_sequences` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void split_blocks_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `split_blocks` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

template <typename P>
void merge_block_rows_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `merge_block_rows` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// How k picks of a sequence of n tokens are shared out to its blocks of `size` tokens, the last of which may be
/// shorter: block j has the picks [⌊k · begin_j / n⌋, ⌊k · end_j / n⌋), where begin_j and end_j are its ends. So each
/// block has its share of k to within one pick, and together they have exactly k, which is at most n.
///
/// With by_real_tokens, n is the number of tokens up to the last real one of each sample, and k at most that.
struct RouteBlocks {
    Index length, size, picks;
    bool by_real_tokens = false;

    COLT5_HOST_DEVICE Index count() const { return (length + size - 1) / size; }
    /// The first pick of block j; that of block count() is k.
    COLT5_HOST_DEVICE Index first_pick(Index block) const {
        const Index begin = block * size;
        return begin >= length ? picks : picks * begin / length;
    }
    /// The block of a pick.
    COLT5_HOST_DEVICE Index block_of(Index pick) const { return ((pick + 1) * length - 1) / picks / size; }
    /// At least the picks of any block, at most its tokens; 1 where there is no block, so that a router may be asked.
    COLT5_HOST_DEVICE Index picks_of_block() const {
        if (by_real_tokens) return picks < 1 ? 1 : picks < size ? picks : size;
        const Index share = length == 0 ? 1 : (picks * size + length - 1) / length;
        return share < size ? share : size;
    }
    /// Those of a sample with `real` tokens up to its last real one, as if it were alone and had no others.
    COLT5_HOST_DEVICE RouteBlocks of_sample(Index real) const {
        return {real, real >= size ? size : real > 0 ? real : 1, picks < real ? picks : real};
    }
    /// The same where `lengths` has the numbers of tokens of all samples, or is null.
    COLT5_HOST_DEVICE RouteBlocks of_sample(const TokenIndex* lengths, Index sample) const {
        return lengths != nullptr ? of_sample(lengths[sample]) : *this;
    }
};

/// What is to be known of each sample, and of each of its blocks, where RouteBlocks::by_real_tokens.
template <Policy P>
struct BlockShares {
    VectorTensor<TokenIndex, P> lengths;  // (b): the number of tokens up to the last real one
    VectorTensor<TokenIndex, P> picks;    // (b · blocks): picks_of_block() of the sample's blocks
};

/// mask (b, n)  →  BlockShares
template <Policy P>
BlockShares<P> block_shares(const P& policy, const RouteBlocks& blocks, Mask mask) {
    expect_shape("mask", mask.shape(), {dynamic, blocks.length});
    expect_length("mask", blocks.length);
    BlockShares<P> shares{{policy, {mask.extent(0)}}, {policy, {mask.extent(0) * blocks.count()}}};
    block_shares_kernel(policy, blocks, shares.lengths.view(), shares.picks.view(), mask);
    return shares;
}

/// Sequences with rows behind them, as long as they have room: padded (b, m, d) gets x (b, n, d), n ≤ m, and zeros; or
/// ones where x is absent, for its first n rows, such as for a mask of which all are real.
template <Policy P, typename T>
void pad_sequences(const P& policy, TokensView<T> padded, TokensView<const T> x, Index length) {
    if (x) expect_shape("x", x.shape(), {padded.extent(0), length, padded.extent(2)});
    if (length > padded.extent(1)) expect_value(false, "length", "at most the length of `padded`", length);
    pad_sequences_kernel(policy, padded, x, length);
}

/// The picks of a sequence from those of its blocks: indices (b · blocks, r, picks_of_block) count from the start of a
/// block, scores likewise  →  (b, r, k), indices from the start of the sequence. Where a block has fewer picks than
/// there are here, its last ones are left out. `lengths` (b) are those of BlockShares, or absent: a sample with fewer
/// tokens than k has them all, and behind them tokens of its padding, with score 0.
template <Policy P, Viewable Indices, Viewable Scores>
auto merge_blocks(const P& policy, const RouteBlocks& blocks, Index batch, const Indices& indices, const Scores& scores,
                  VectorView<const TokenIndex> lengths = {}) {
    using Logit = typename Scores::value_type;
    struct Picks {
        Tensor<TokenIndex, P, dynamic, dynamic, dynamic> indices;
        Tensor<Logit, P, dynamic, dynamic, dynamic> scores;
    };
    static_assert(are_indices<Indices>, "colt5: `indices` must be of TokenIndex");
    const Index routes = indices.extent(1);
    expect_shape("indices", indices.shape(), {batch * blocks.count(), dynamic, blocks.picks_of_block()});
    expect_shape("scores", scores.shape(), indices.shape());
    Picks merged{{policy, {batch, routes, blocks.picks}}, {policy, {batch, routes, blocks.picks}}};
    merge_blocks_kernel(policy, blocks, merged.indices.view(), merged.scores.view(), indices.const_view(),
                        scores.const_view(), lengths);
    return merged;
}

/// Numbers of all tokens, such as logits, from those of the blocks: (b · blocks, r, size)  →  (b, r, n)
template <Policy P, Viewable X>
auto merge_block_rows(const P& policy, const RouteBlocks& blocks, Index batch, const X& x) {
    expect_shape("x", x.shape(), {batch * blocks.count(), dynamic, blocks.size});
    TokensTensor<typename X::value_type, P> merged(policy, {batch, x.extent(1), blocks.length});
    merge_block_rows_kernel(policy, blocks, merged.view(), x.const_view());
    return merged;
}

/// Vector-Jacobian product of the scores of merge_blocks: d_scores (b, r, k)  →  (b · blocks, r, picks_of_block), 0 for
/// the picks that were left out.
template <Policy P, Viewable D>
auto split_blocks(const P& policy, const RouteBlocks& blocks, const D& d_scores,
                  VectorView<const TokenIndex> lengths = {}) {
    expect_shape("d_scores", d_scores.shape(), {dynamic, dynamic, blocks.picks});
    Tensor<typename D::value_type, P, dynamic, dynamic, dynamic> split(
        policy, {d_scores.extent(0) * blocks.count(), d_scores.extent(1), blocks.picks_of_block()});
    split_blocks_kernel(policy, blocks, split.view(), d_scores.const_view(), lengths);
    return split;
}

}  // namespace colt5
