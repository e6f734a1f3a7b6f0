// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>

#include <colt5/cuda/kernel.cuh>

#include <colt5/op/causal_key_counts.hpp>

namespace colt5 {

namespace cuda {

/// Picks of all routes, (b, routes, length).
template <typename Position>
struct PicksOfRoutes {
    const Position* positions;
    const bool* live;  // or null
    Index routes, length;
};

/// counts (b, groups, length of the queries)
template <typename Position>
__global__ void causal_key_counts(Position* counts, PicksOfRoutes<Position> queries, PicksOfRoutes<Position> keys,
                                  Index groups, Index null_keys, Index size) {
    for (Index i = global_thread(); i < size; i += grid_threads()) {
        const Index row = quotient(i, queries.length), b = quotient(row, groups), g = row - b * groups;
        const Index query =
            (b * queries.routes + g * queries.routes / groups) * queries.length + i - row * queries.length;
        const Index first_key = (b * keys.routes + g * keys.routes / groups) * keys.length;
        const bool* const live = keys.live == nullptr ? nullptr : keys.live + first_key;
        const Index seen =
            PickedPositions::count_until(keys.positions + first_key, live, keys.length, queries.positions[query]);
        const bool is_live = queries.live == nullptr || queries.live[query];
        counts[i] = is_live ? static_cast<Position>(null_keys + seen) : Position(0);
    }
}

}  // namespace cuda

template <std::same_as<TokenIndex> Integer>
void causal_key_counts_kernel(const Cuda& policy, TokensView<Integer> counts, const PickedPositions& queries,
                              const PickedPositions& keys, Index null_keys) {
    constexpr int threads = 128;
    const auto picks = [](const PickedPositions& of) {
        return cuda::PicksOfRoutes<TokenIndex>{of.positions.data(), of.live.data(), of.positions.extent(1),
                                               of.positions.extent(2)};
    };
    cuda::launch(policy, "causal_key_counts", cuda::causal_key_counts<TokenIndex>,
                 cuda::blocks_for(counts.size(), threads), threads, 0, counts.data(), picks(queries), picks(keys),
                 counts.extent(1), null_keys, counts.size());
}

}  // namespace colt5
