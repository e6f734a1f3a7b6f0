// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/append_keys.hpp>

namespace colt5 {

namespace cuda {

/// The tensors of RoutedKeys and their extents.
template <typename T>
struct RoutedKeysPointers {
    T* kv;
    accumulate_t<T>* value_scale;
    TokenIndex *positions, *counts;
    Index rows, capacity, width;
};

inline constexpr int append_threads = 128;

/// One block of threads for each pick of each route.
template <typename T>
__global__ void append_keys(RoutedKeysPointers<T> to, const T* kv, const accumulate_t<T>* value_scale,
                            const TokenIndex* positions, const bool* live, Index count) {
    const RowBlock at(count);
    const Index route = at.row, pick = route * count + at.block;
    const Index place = to.counts[route] + static_cast<Index>(at.block);
    if (!live[pick] || place >= to.capacity) return;
    const Index row = route * to.rows + to.rows - to.capacity + place;
    for (Index e = threadIdx.x; e < to.width; e += append_threads) to.kv[row * to.width + e] = kv[pick * to.width + e];
    if (threadIdx.x != 0) return;
    to.value_scale[row] = value_scale[pick];
    to.positions[route * to.capacity + place] = positions[pick];
}

/// A thread for each route.
template <typename Count>
__global__ void count_appended_keys(Count* counts, const bool* live, Index routes, Index count, Index capacity) {
    for (Index route = global_thread(); route < routes; route += grid_threads()) {
        Index all = counts[route];
        for (Index i = 0; i < count && all < capacity && live[route * count + i]; ++i) ++all;
        counts[route] = static_cast<Count>(all);
    }
}

}  // namespace cuda

template <typename T>
void append_keys_kernel(const Cuda& policy, View<T, dynamic, dynamic, dynamic, dynamic> to_kv,
                        TokensView<accumulate_t<T>> to_scale, TokensView<TokenIndex> to_positions,
                        MatrixView<TokenIndex> counts, View<const T, dynamic, dynamic, dynamic, dynamic> kv,
                        TokensView<const accumulate_t<T>> value_scale, TokensView<const TokenIndex> positions,
                        TokensView<const bool> live) {
    const Index count = kv.extent(2), routes = counts.size(), capacity = to_positions.extent(2);
    if (routes == 0 || count == 0) return;
    cuda::launch(policy, "append_keys", cuda::append_keys<T>, cuda::grid_of_rows(routes, count), cuda::append_threads,
                 0,
                 cuda::RoutedKeysPointers<T>{to_kv.data(), to_scale.data(), to_positions.data(), counts.data(),
                                             to_kv.extent(2), capacity, kv.extent(3)},
                 kv.data(), value_scale.data(), positions.data(), live.data(), count);
    cuda::launch(policy, "count_appended_keys", cuda::count_appended_keys<TokenIndex>,
                 cuda::blocks_for(routes, cuda::append_threads), cuda::append_threads, 0, counts.data(), live.data(),
                 routes, count, capacity);
}

}  // namespace colt5
