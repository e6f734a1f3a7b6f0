// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cpu/parallel.hpp>
#include <colt5/op/relative_position_bias.hpp>

namespace colt5 {

template <typename T>
void relative_position_bias_kernel(const Cpu&, MatrixView<T> by_distance, MatrixView<const T> table,
                                   const RelativePositionBuckets& buckets) {
    const Index heads = by_distance.extent(0), span = by_distance.extent(1) / 2;
    for (Index r = -span; r <= span; ++r) {
        const Index bucket = buckets.bucket(r);
        for (Index h = 0; h < heads; ++h) by_distance(h, span + r) = table(bucket, h);
    }
}

namespace cpu {

/// Adds to d_table (num_buckets, h) the gradients of parts of the work, (parts, h, 2 · span + 1), part by part and
/// distance by distance.
template <typename T>
void add_bias_gradient(const Cpu& policy, MatrixView<T> d_table, TokensView<const T> d_by_distance,
                       const RelativePositionBuckets& buckets) {
    const Index parts = d_by_distance.extent(0), heads = d_by_distance.extent(1), distances = d_by_distance.extent(2);
    const Index span = distances / 2;
    parallel_for(policy, heads, [&](Index h) {
        T* const sums = thread_scratch<T, struct Sums>(distances);
        std::fill_n(sums, distances, T(0));
        for (Index part = 0; part < parts; ++part)
            for (Index i = 0; i < distances; ++i) sums[i] += d_by_distance(part, h, i);
        for (Index i = 0; i < distances; ++i) d_table(buckets.bucket(i - span), h) += sums[i];
    });
}

}  // namespace cpu

template <typename T>
void relative_position_bias_vjp_kernel(const Cpu& policy, MatrixView<T> d_table, MatrixView<const T> d_by_distance,
                                       const RelativePositionBuckets& buckets) {
    const auto [heads, distances] = d_by_distance.shape();
    cpu::add_bias_gradient(policy, d_table, TokensView<const T>(d_by_distance.data(), {1, heads, distances}), buckets);
}

}  // namespace colt5
