// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cpu/parallel.hpp>
#include <colt5/op/copy_tokens.hpp>

namespace colt5 {

template <typename T>
void copy_tokens_kernel(const Cpu& policy, TokensView<T> to, Index to_first, TokensView<const T> from, Index from_first,
                        Index count) {
    const Index width = to.extent(2);
    parallel_for(policy, to.extent(0), [&](Index b) {
        std::copy_n(from[b].data() + from_first * width, count * width, to[b].data() + to_first * width);
    });
}

}  // namespace colt5
