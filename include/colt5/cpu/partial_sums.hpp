// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>

#include <colt5/core/tensor.hpp>
#include <colt5/cpu/policy.hpp>
#include <colt5/cpu/simd.hpp>

namespace colt5::cpu {

/// Gradients of `count` parameters of `columns` numbers each that all rows share. Each task of a loop over rows has
/// sums of its own, zeros at the start, which are added up in order at the end: the bits do not depend on the number of
/// threads.
template <typename T, std::size_t count = 1>
class PartialSums {
public:
    PartialSums(const Cpu& policy, Index tasks, Index columns) : sums_(policy, {tasks, Index{count}, columns}) {
        std::fill_n(sums_.data(), sums_.size(), T(0));
    }

    /// The sums of one task, a pointer for each parameter.
    std::array<T*, count> operator[](Index task) {
        std::array<T*, count> sums;
        for (std::size_t i = 0; i < count; ++i) sums[i] = row(task, i);
        return sums;
    }
    /// totals[i] += the sums of parameter i; an absent total is left alone.
    void add_to(const std::array<VectorView<T>, count>& totals) const {
        for (std::size_t i = 0; i < count; ++i)
            for (Index task = 0; task < sums_.extent(0); ++task)
                add_row(totals[i].data(), row(task, i), totals[i].size());
    }

private:
    T* row(Index task, std::size_t i) {
        return sums_.data() + (task * Index{count} + static_cast<Index>(i)) * sums_.extent(2);
    }
    const T* row(Index task, std::size_t i) const {
        return sums_.data() + (task * Index{count} + static_cast<Index>(i)) * sums_.extent(2);
    }

    Tensor<T, Cpu, dynamic, dynamic, dynamic> sums_;
};

/// sum += Σ of rows
template <typename T>
void add_rows(const T* rows, Index count, Index columns, T* sum) {
    for (Index i = 0; i < count; ++i) add_row(sum, rows + i * columns, columns);
}

}  // namespace colt5::cpu
