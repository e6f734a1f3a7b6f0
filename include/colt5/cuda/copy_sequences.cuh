// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/copy_sequences.hpp>

namespace colt5 {

namespace cuda {

/// The first rows of so many sequences are arguments of a launch: it needs no copy to the device, and a graph keeps it.
inline constexpr Index sequences_of_launch = 256;
struct FirstRows {
    Index of[sequences_of_launch];
};

/// Copies row j of sequence i, with one warp: from row firsts.of[i] + j of all rows to row i · length + j, or back.
template <typename Pack, bool back>
__global__ void copy_sequences(Pack* to, const Pack* from, const __grid_constant__ FirstRows firsts, Index length,
                               Index columns, Index rows) {
    for (Index row = global_thread() / warp_size; row < rows; row += grid_threads() / warp_size) {
        const Index sequence = quotient(row, length);
        const Index among_all = firsts.of[sequence] + row - sequence * length;
        Pack* const out = to + (back ? among_all : row) * columns;
        const Pack* const in = from + (back ? row : among_all) * columns;
        for (Index j = lane_id(); j < columns; j += warp_size) out[j] = in[j];
    }
}

/// `part` are the rows of the sequences, (firsts.size() · length, columns), `all` those of all tokens.
template <bool back, typename T>
void start_copy_sequences(const Cuda& policy, T* to, const T* from, std::span<const Index> firsts, Index length,
                          Index columns) {
    constexpr int threads = 256;
    const auto count = static_cast<Index>(firsts.size());
    for (Index first = 0; first < count; first += sequences_of_launch) {
        const Index sequences = std::min(sequences_of_launch, count - first), rows = sequences * length;
        FirstRows some{};
        std::copy_n(firsts.begin() + first, sequences, some.of);
        launch(policy, "copy_sequences", copy_sequences<T, back>, blocks_for(rows * warp_size, threads), threads, 0,
               to + (back ? 0 : first * length * columns), from + (back ? first * length * columns : 0), some, length,
               columns, rows);
    }
}

template <bool back, typename T>
void copy_sequences_in_packs(const Cuda& policy, T* to, const T* from, std::span<const Index> firsts, Index length,
                             Index dim) {
    if (fits_packs<T>(dim, to, from)) {
        using Packed = Pack<T, pack_size<T>>;
        start_copy_sequences<back>(policy, reinterpret_cast<Packed*>(to), reinterpret_cast<const Packed*>(from), firsts,
                                   length, dim / pack_size<T>);
    } else {
        start_copy_sequences<back>(policy, to, from, firsts, length, dim);
    }
}

}  // namespace cuda

template <typename T>
void gather_sequences_kernel(const Cuda& policy, TokensView<T> out, MatrixView<const T> all,
                             std::span<const Index> firsts) {
    cuda::copy_sequences_in_packs<false>(policy, out.data(), all.data(), firsts, out.extent(1), out.extent(2));
}

template <typename T>
void scatter_sequences_kernel(const Cuda& policy, MatrixView<T> all, TokensView<const T> x,
                              std::span<const Index> firsts) {
    cuda::copy_sequences_in_packs<true>(policy, all.data(), x.data(), firsts, x.extent(1), x.extent(2));
}

}  // namespace colt5
