// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/core/tensor.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/simd.hpp>

namespace colt5::cpu {

/// Rows that one task of a row-wise kernel takes. Fixed, so that sums over chunks do not depend on the threads.
inline constexpr Index rows_per_chunk = 128;

/// Calls body(chunk, begin, end) for consecutive chunks of rows, in parallel.
template <typename Body>
void for_each_row_chunk(const Cpu& policy, Index rows, Body&& body) {
    const Index chunks = (rows + rows_per_chunk - 1) / rows_per_chunk;
    parallel_for(policy, chunks, [&](Index chunk) {
        body(chunk, chunk * rows_per_chunk, std::min(rows, (chunk + 1) * rows_per_chunk));
    });
}

/// One zeroed row of sums per chunk, added up in order at the end: the gradient of a parameter that every row shares.
template <typename T>
class PartialSums {
public:
    PartialSums(const Cpu& policy, Index rows, Index columns)
        : parts_(policy, {(rows + rows_per_chunk - 1) / rows_per_chunk, columns}) {
        std::fill_n(parts_.data(), parts_.size(), T(0));
    }
    T* part(Index chunk) { return parts_.data() + chunk * parts_.extent(1); }
    void add_to(VectorView<T> total) const {
        for (Index chunk = 0; chunk < parts_.extent(0); ++chunk)
            add_row(total.data(), parts_.data() + chunk * parts_.extent(1), parts_.extent(1));
    }

private:
    MatrixTensor<T, Cpu> parts_;
};

}  // namespace colt5::cpu
