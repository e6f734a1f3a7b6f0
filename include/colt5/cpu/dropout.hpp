// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include <colt5/cpu/parallel.hpp>
#include <colt5/op/dropout.hpp>

namespace colt5 {

namespace cpu {
/// The random words of elements first … first + count − 1, which are compared with the threshold. They are in `words`,
/// which has room for count + 6: those of whole blocks.
inline const std::uint32_t* dropout_words(std::uint32_t* words, Index first, Index count, const DropoutMask& drop) {
    const Random random = drop.random;
    const Index begin = first / 4, blocks = divide_up(first + count, 4) - begin;
    for (Index block = 0; block < blocks; ++block) {
        const auto of_block = random.bits(static_cast<std::uint64_t>(begin + block));
        for (std::size_t i = 0; i < 4; ++i) words[4 * block + static_cast<Index>(i)] = of_block[i];
    }
    return words + first % 4;
}
}  // namespace cpu

template <typename T>
void dropout_kernel(const Cpu& policy, TokensView<T> out, TokensView<const T> x, TokensView<const T> residual,
                    Mask mask, const DropoutMask& drop) {
    const Index tokens = x.extent(0) * x.extent(1), dim = x.extent(2);
    const std::uint32_t threshold = drop.threshold();
    const T factor = static_cast<T>(drop.scale());
    parallel_for(policy, tokens, [&](Index token) {
        const std::uint32_t* const words = cpu::dropout_words(
            cpu::thread_scratch<std::uint32_t, struct DropoutWords>(dim + 6), token * dim, dim, drop);
        const T* const from = x.data() + token * dim;
        T* const to = out.data() + token * dim;
        const auto value = [&](Index j) { return words[j] >= threshold ? factor * from[j] : T(0); };
        if (!residual) {
            for (Index j = 0; j < dim; ++j) to[j] = value(j);
            return;
        }
        const T* const add = residual.data() + token * dim;
        if (mask && !mask.data()[token])
            for (Index j = 0; j < dim; ++j) to[j] = (std::isfinite(add[j]) ? add[j] : T(0)) + value(j);
        else
            for (Index j = 0; j < dim; ++j) to[j] = add[j] + value(j);
    });
}

}  // namespace colt5
