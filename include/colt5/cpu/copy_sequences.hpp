// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include <colt5/cpu/parallel.hpp>
#include <colt5/op/copy_sequences.hpp>

namespace colt5 {

template <typename T>
void gather_sequences_kernel(const Cpu& policy, TokensView<T> out, MatrixView<const T> all,
                             std::span<const Index> firsts) {
    const Index count = out.extent(1) * out.extent(2);
    parallel_for(policy, out.extent(0), [&](Index i) {
        std::copy_n(all.data() + firsts[static_cast<std::size_t>(i)] * all.extent(1), count, out.data() + i * count);
    });
}

template <typename T>
void scatter_sequences_kernel(const Cpu& policy, MatrixView<T> all, TokensView<const T> x,
                              std::span<const Index> firsts) {
    const Index count = x.extent(1) * x.extent(2);
    parallel_for(policy, x.extent(0), [&](Index i) {
        std::copy_n(x.data() + i * count, count, all.data() + firsts[static_cast<std::size_t>(i)] * all.extent(1));
    });
}

}  // namespace colt5
