// SPDX-License-Identifier: MIT
#pragma once

#include <atomic>

#include <colt5/cpu/expr.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/clean_padding.hpp>

namespace colt5 {

template <typename T>
bool padding_is_finite_kernel(const Cpu& policy, TokensView<const T> x, Mask mask) {
    const Index dim = x.extent(2);
    std::atomic<bool> finite = true;
    cpu::for_each_row_chunk(policy, mask.size(), [&](Index, Index begin, Index end) {
        for (Index row = begin; row < end; ++row)
            if (!mask.data()[row] && !cpu::all_finite(x.data() + row * dim, dim)) finite = false;
    });
    return finite;
}

}  // namespace colt5
