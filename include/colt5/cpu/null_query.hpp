// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>

#include <colt5/cpu/expr.hpp>
#include <colt5/cpu/gather.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/partial_sums.hpp>
#include <colt5/op/null_query.hpp>

namespace colt5 {

template <std::same_as<bool> Bool>
void unrouted_tokens_kernel(const Cpu&, View<Bool, dynamic, dynamic> unrouted, MatrixView<const TokenIndex> indices,
                            Mask mask, Mask live) {
    cpu::check_indices(indices, unrouted.extent(1));
    if (mask)
        std::copy_n(mask.data(), mask.size(), unrouted.data());
    else
        std::fill_n(unrouted.data(), unrouted.size(), true);
    for (Index b = 0; b < indices.extent(0); ++b)
        for (Index i = 0; i < indices.extent(1); ++i)
            if (!live || live(b, i)) unrouted(b, indices(b, i)) = false;
}

template <typename T>
void null_query_vjp_kernel(const Cpu& policy, VectorView<T> d_null_token, TokensView<const T> d_out, Mask unrouted) {
    const Index rows = unrouted.size(), dim = d_out.extent(2);
    cpu::PartialSums<T> sums(policy, cpu::row_chunks(rows), dim);
    cpu::for_each_row_chunk(policy, rows, [&](Index chunk, Index begin, Index end) {
        for (Index row = begin; row < end; ++row)
            if (unrouted.data()[row]) cpu::add_row(sums[chunk][0], d_out.data() + row * dim, dim);
    });
    sums.add_to({d_null_token});
}

}  // namespace colt5
