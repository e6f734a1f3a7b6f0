// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/launch.cuh>

namespace colt5::cuda {

/// The mask (b, n) as rows of logits (b, r, n) have it: the r rows of a sequence share its mask.
class RowMask {
public:
    /// `mask` may be null. Entry i is that of token `begin` + i of row `row`.
    __device__ RowMask(const bool* mask, Index row, Index routes, Index length, Index begin = 0)
        : real_(mask != nullptr ? mask + row / routes * length + begin : nullptr) {}
    /// The entries of the row, or null.
    __device__ const bool* data() const { return real_; }
    /// Whether a token is real, not masked.
    __device__ bool operator[](Index i) const { return real_ == nullptr || real_[i]; }

private:
    const bool* real_;
};

}  // namespace colt5::cuda
