// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/core/macros.hpp>
#include <colt5/core/tensor.hpp>

namespace colt5 {

/// A number of tokens: one for all samples, or if `of_sample` (b) is given one for each, in the policy's memory.
struct SampleCount {
    Index all;
    const TokenIndex* of_sample = nullptr;

    SampleCount(Index count, VectorView<const TokenIndex> of_each = {})  // NOLINT: converts
        : all(count), of_sample(of_each.data()) {}
    COLT5_HOST_DEVICE Index operator()(Index sample) const { return of_sample != nullptr ? of_sample[sample] : all; }
};

}  // namespace colt5
