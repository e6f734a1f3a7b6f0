// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include <colt5/cpu/parallel.hpp>
#include <colt5/op/dropout.hpp>

namespace colt5 {

namespace cpu {
/// factors[i] = factor if dropout keeps element first + i, otherwise 0.
template <typename T>
void dropout_factors(T* factors, Index first, Index count, const DropoutMask& drop) {
    const std::uint32_t threshold = drop.threshold();
    const T factor = static_cast<T>(drop.scale());
    for (Index i = 0; i < count;) {
        const Index element = first + i;
        const auto bits = drop.random.bits(static_cast<std::uint64_t>(element / 4));
        for (Index word = element % 4; word < 4 && i < count; ++word, ++i)
            factors[i] = bits[static_cast<std::size_t>(word)] >= threshold ? factor : T(0);
    }
}
}  // namespace cpu

template <typename T>
void dropout_kernel(const Cpu& policy, TokensView<T> out, TokensView<const T> x, TokensView<const T> residual,
                    Mask mask, const DropoutMask& drop) {
    const Index tokens = x.extent(0) * x.extent(1), dim = x.extent(2);
    parallel_for(policy, tokens, [&](Index token) {
        T* const factors = cpu::thread_scratch<T, struct DropoutFactors>(dim);
        cpu::dropout_factors(factors, token * dim, dim, drop);
        const T *const from = x.data() + token * dim, *const add = residual ? residual.data() + token * dim : nullptr;
        T* const to = out.data() + token * dim;
        const bool padding = mask && !mask.data()[token];
        for (Index j = 0; j < dim; ++j) {
            const T value = factors[j] == 0 ? T(0) : factors[j] * from[j];
            to[j] = !add || (padding && !std::isfinite(add[j])) ? value : add[j] + value;
        }
    });
}

}  // namespace colt5
