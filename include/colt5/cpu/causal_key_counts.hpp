// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>

#include <colt5/cpu/parallel.hpp>
#include <colt5/op/causal_key_counts.hpp>

namespace colt5 {

template <std::same_as<TokenIndex> Integer>
void causal_key_counts_kernel(const Cpu& policy, TokensView<Integer> counts, const PickedPositions& queries,
                              const PickedPositions& keys, Index null_keys) {
    const Index groups = counts.extent(1), length = counts.extent(2);
    parallel_for(policy, counts.extent(0) * groups, [&](Index task) {
        const Index b = task / groups, g = task % groups;
        const Index query_route = g * queries.positions.extent(1) / groups,
                    key_route = g * keys.positions.extent(1) / groups;
        const TokenIndex* const of_keys = keys.positions[b][key_route].data();
        const bool* const live = keys.live ? keys.live[b][key_route].data() : nullptr;
        for (Index i = 0; i < length; ++i) {
            const Index seen = PickedPositions::count_until(of_keys, live, keys.positions.extent(2),
                                                            queries.positions(b, query_route, i));
            const bool is_live = !queries.live || queries.live(b, query_route, i);
            counts(b, g, i) = is_live ? static_cast<TokenIndex>(null_keys + seen) : 0;
        }
    });
}

}  // namespace colt5
