// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/core/tensor.hpp>

namespace colt5 {

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
struct RouteBlocks {
    Index length, size, picks;

    COLT5_HOST_DEVICE Index count() const { return (length + size - 1) / size; }
    /// The first pick of block j; that of block count() is k.
    COLT5_HOST_DEVICE Index first_pick(Index block) const {
        const Index begin = block * size;
        return begin >= length ? picks : picks * begin / length;
    }
    /// At least the picks of any block, at most its tokens; 1 where there is no block, so that a router may be asked.
    COLT5_HOST_DEVICE Index picks_of_block() const {
        const Index share = length == 0 ? 1 : (picks * size + length - 1) / length;
        return share < size ? share : size;
    }
};

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
/// there are here, its last ones are left out.
template <Policy P, Viewable Indices, Viewable Scores>
auto merge_blocks(const P& policy, const RouteBlocks& blocks, Index batch, const Indices& indices,
                  const Scores& scores) {
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
                        scores.const_view());
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
auto split_blocks(const P& policy, const RouteBlocks& blocks, const D& d_scores) {
    expect_shape("d_scores", d_scores.shape(), {dynamic, dynamic, blocks.picks});
    Tensor<typename D::value_type, P, dynamic, dynamic, dynamic> split(
        policy, {d_scores.extent(0) * blocks.count(), d_scores.extent(1), blocks.picks_of_block()});
    split_blocks_kernel(policy, blocks, split.view(), d_scores.const_view());
    return split;
}

}  // namespace colt5
