// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/embedding.hpp>

namespace colt5 {

template <typename T>
void embedding_kernel(const Cpu& policy, MatrixView<T> out, MatrixView<const T> weight,
                      VectorView<const TokenIndex> ids) {
    constexpr Index rows = 64;
    parallel_for(policy, divide_up(ids.size(), rows), [&](Index task) {
        for (Index i = task * rows; i < std::min(ids.size(), (task + 1) * rows); ++i)
            std::copy_n(weight[ids(i)].data(), weight.extent(1), out[i].data());
    });
}

/// Tasks share out columns, so that each sum is in the order of the tokens.
template <typename T>
void embedding_vjp_kernel(const Cpu& policy, MatrixView<T> d_weight, MatrixView<const T> d_out,
                          VectorView<const TokenIndex> ids) {
    constexpr Index columns = 128;
    const Index dim = d_weight.extent(1);
    parallel_for(policy, divide_up(dim, columns), [&](Index task) {
        const Index first = task * columns, count = std::min(columns, dim - first);
        for (Index i = 0; i < ids.size(); ++i)
            cpu::add_row(d_weight[ids(i)].data() + first, d_out[i].data() + first, count, T(1));
    });
}

}  // namespace colt5
