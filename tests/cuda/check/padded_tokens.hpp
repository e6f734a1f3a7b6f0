// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda.cuh>

#include <cstddef>
#include <cstdint>

/// Tokens with padding.
namespace cases {

using namespace colt5;

/// Tokens (2, length, dim) whose padding holds `value`.
template <typename T>
TokensTensor<T, Cuda> tokens_with_padding(const Cuda& policy, Index length, Index dim, int stream, Mask mask,
                                          float value) {
    TokensTensor<T, Cuda> tokens(policy, {2, length, dim});
    fill_normal(policy, tokens, Random(Seed{7}, static_cast<std::uint64_t>(stream)));
    assign(policy, tokens, select(column(mask), tokens, value));
    return tokens;
}

/// Real tokens here and there in the first sequence, and three in the second.
inline MatrixTensor<bool, Cuda> mask_of(const Cuda& policy, Index length) {
    MatrixTensor<bool, Cuda> mask(policy, {2, length});
    fill_with(policy, mask, [&](std::size_t i) {
        const auto at = static_cast<Index>(i);
        return at < length ? at % 5 != 3 && at % 64 < 50 : at < length + 3;
    });
    return mask;
}

}  // namespace cases
