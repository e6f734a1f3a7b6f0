// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cpu/parallel.hpp>
#include <colt5/op/append_keys.hpp>

namespace colt5 {

template <typename T>
void append_keys_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> to_kv, TokensView<T> to_scale,
                        TokensView<TokenIndex> to_positions, MatrixView<TokenIndex> counts,
                        View<const T, dynamic, dynamic, dynamic, dynamic> kv, TokensView<const T> value_scale,
                        TokensView<const TokenIndex> positions, TokensView<const bool> live) {
    const Index count = kv.extent(2), width = kv.extent(3), rows = to_kv.extent(2), capacity = to_positions.extent(2);
    parallel_for(policy, counts.size(), [&](Index route) {
        TokenIndex& filled = counts.data()[route];
        const bool* const of_route = live.data() + route * count;
        const Index all = std::find(of_route, of_route + count, false) - of_route;
        const Index taken = std::min(all, capacity - filled), at = route * rows + rows - capacity + filled;
        std::copy_n(kv.data() + route * count * width, taken * width, to_kv.data() + at * width);
        std::copy_n(value_scale.data() + route * count, taken, to_scale.data() + at);
        std::copy_n(positions.data() + route * count, taken, to_positions.data() + route * capacity + filled);
        filled += static_cast<TokenIndex>(taken);
    });
}

}  // namespace colt5
