// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstddef>
#include <span>

#include <colt5/core/tensor.hpp>

/// Copies sequences of one length from the rows of a ragged batch to a dense batch, and back.
namespace colt5 {

template <typename P>
void gather_sequences_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `gather_sequences` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void scatter_sequences_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `scatter_sequences` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

namespace detail {
inline void expect_sequences(std::span<const Index> firsts, Index rows, const std::array<Index, 3>& shape) {
    expect_value(static_cast<Index>(firsts.size()) == shape[0], "firsts", "one row for each sequence",
                 static_cast<Index>(firsts.size()));
    for (const Index first : firsts)
        expect_value(first >= 0 && shape[1] <= rows && first <= rows - shape[1], "firsts",
                     "rows from which on a sequence lies in all rows", first);
}
}  // namespace detail

/// out[i, j] = all[firsts[i] + j]:  all (rows, d), out (count, n, d)
///
/// `firsts`, the first row of each sequence, is on the host and read during the call; a CUDA graph keeps a copy. Throws
/// ShapeError if d differs, ValueError if a sequence does not lie in `all` or firsts.size() is not `count`.
template <Policy P, typename T>
void gather_sequences(const P& policy, TokensView<T> out, MatrixView<const T> all, std::span<const Index> firsts) {
    expect_shape("out", out.shape(), {dynamic, dynamic, all.extent(1)});
    detail::expect_sequences(firsts, all.extent(0), out.shape());
    gather_sequences_kernel(policy, out, all, firsts);
}

/// The reverse, all[firsts[i] + j] = x[i, j], with the same errors. Other rows stay. Sequences must not overlap.
template <Policy P, typename T>
void scatter_sequences(const P& policy, MatrixView<T> all, TokensView<const T> x, std::span<const Index> firsts) {
    expect_shape("x", x.shape(), {dynamic, dynamic, all.extent(1)});
    detail::expect_sequences(firsts, all.extent(0), x.shape());
    scatter_sequences_kernel(policy, all, x, firsts);
}

}  // namespace colt5
