// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <numeric>

#include <colt5/core/tensor.hpp>

namespace colt5 {

template <typename P>
void causal_key_counts_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `causal_key_counts` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// Picked tokens: their positions in the sequence, and which of them a router that leaves picks unused has chosen.
struct PickedPositions {
    TokensView<const TokenIndex> positions;  // (b, r, k)
    TokensView<const bool> live;             // (b, r, k); absent: all

    /// Of the first `count` picks of a route, which must be in the order of the sequence with the live ones first: how
    /// many are live and at `position` or before.
    COLT5_HOST_DEVICE static Index count_until(const TokenIndex* positions, const bool* live, Index count,
                                               TokenIndex position) {
        Index begin = 0;
        while (count > 0) {  // binary search in [begin, begin + count)
            const Index half = count / 2, at = begin + half;
            if (positions[at] <= position && (live == nullptr || live[at])) {
                begin = at + 1;
                count -= half + 1;
            } else {
                count = half;
            }
        }
        return begin;
    }
};

/// How many of the picked keys each picked query sees if it sees no later token than itself:
///
///     counts[b, g, i] = null_keys + |{j : keys.live[b, j], keys.positions[b, j] <= queries.positions[b, i]}|
///
/// and 0 for a query that is not live. With r routes of queries and s of keys there are lcm(r, s) groups g: group g has
/// the queries of route ⌊g r / lcm⌋ and the keys of route ⌊g s / lcm⌋. So the counts are what FirstKeys wants, for any
/// number of heads that both divide.
///
/// In each route of keys the live ones come first, in the order of the sequence, as causal_top_k returns them. Throws
/// ShapeError when the inputs do not fit together, ValueError when there are no routes.
template <Policy P>
TokensTensor<TokenIndex, P> causal_key_counts(const P& policy, const PickedPositions& queries,
                                              const PickedPositions& keys, Index null_keys = 0) {
    const auto [batch, query_routes, length] = queries.positions.shape();
    expect_shape("keys.positions", keys.positions.shape(), {batch, dynamic, dynamic});
    expect_value(query_routes >= 1, "queries.positions", "of at least one route", query_routes);
    expect_value(keys.positions.extent(1) >= 1, "keys.positions", "of at least one route", keys.positions.extent(1));
    if (queries.live) expect_shape("queries.live", queries.live.shape(), queries.positions.shape());
    if (keys.live) expect_shape("keys.live", keys.live.shape(), keys.positions.shape());
    expect_value(null_keys >= 0, "null_keys", ">= 0", null_keys);
    expect_length("keys", keys.positions.extent(2) + null_keys);
    const Index groups = std::lcm(query_routes, keys.positions.extent(1));
    TokensTensor<TokenIndex, P> counts(policy, {batch, groups, length});
    causal_key_counts_kernel(policy, counts.view(), queries, keys, null_keys);
    return counts;
}

}  // namespace colt5
