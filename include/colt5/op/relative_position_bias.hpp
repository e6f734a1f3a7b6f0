// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>

#include <colt5/core/tensor.hpp>

namespace colt5 {

template <typename P>
void relative_position_bias_kernel(const P&, ...) {
    static_assert(
        has_kernel<P>,
        "colt5: no `relative_position_bias` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void relative_position_bias_vjp_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `relative_position_bias_vjp` kernel for this policy: include <colt5/cpu.hpp> or "
                  "<colt5/cuda.cuh>");
}

/// T5's buckets of relative positions, key − query, for attention in both directions. Half of the buckets are for keys
/// before the query or at it (0 or less), half for keys after it. Of each half, the first half holds one distance each;
/// the others grow with the logarithm of the distance, and the last one begins at max_distance at the latest.
struct RelativePositionBuckets {
    Index num_buckets = 32;    ///< even, at least 4
    Index max_distance = 128;  ///< more than num_buckets / 4; all keys so far away or further share two buckets

    /// The bucket of a relative position: the integers of `_relative_position_bucket` of T5 in the package
    /// transformers.
    COLT5_HOST_DEVICE Index bucket(Index relative) const {
        const Index half = num_buckets / 2, exact = half / 2, distance = relative < 0 ? -relative : relative;
        Index of_distance = distance;
        if (distance >= max_distance) {
            of_distance = half - 1;
        } else if (distance >= exact) {
            const double first = static_cast<double>(exact), last = static_cast<double>(max_distance);
            const double part = std::log(static_cast<double>(distance) / first) / std::log(last / first);
            // Where a bucket begins at an integer, the quotient may come out a little below.
            const Index beyond = static_cast<Index>(part * static_cast<double>(half - exact) + 1e-9);
            of_distance = exact + (beyond < half - exact ? beyond : half - exact - 1);
        }
        return (relative > 0 ? half : 0) + of_distance;
    }
};

/// What the logits of attention get added by relative position r = key − query: by_distance[h][span + r] in head h;
/// what is further than `span` gets that of ±span.
template <typename T>
struct RelativePositionBias {
    RelativePositionBuckets buckets;  // in which the gradient is summed
    MatrixView<const T> by_distance;  // (h, 2 · span + 1)
};
/// Attention without such a bias.
struct NoBias {};

namespace detail {
inline void check_buckets(const RelativePositionBuckets& buckets) {
    expect_value(buckets.num_buckets >= 4, "num_buckets", "at least 4", buckets.num_buckets);
    expect_value(buckets.num_buckets % 2 == 0, "num_buckets", "even", buckets.num_buckets);
    expect_value(buckets.max_distance > buckets.num_buckets / 4, "max_distance", "more than num_buckets / 4",
                 buckets.max_distance);
    expect_value(buckets.max_distance <= Index{1} << 20, "max_distance", "at most 2^20", buckets.max_distance);
}
/// Of the bias that an attention of `heads` heads is given.
template <typename T>
void check_bias(const RelativePositionBias<T>& bias, Index heads) {
    check_buckets(bias.buckets);
    expect_shape("bias", bias.by_distance.shape(), {heads, dynamic});
    expect_value(bias.by_distance.extent(1) % 2 == 1, "bias", "of an odd number of relative positions",
                 bias.by_distance.extent(1));
}
inline void check_bias(NoBias, Index) {}
template <typename T>
RelativePositionBuckets buckets_of_bias(const RelativePositionBias<T>& bias) {
    return bias.buckets;
}
inline RelativePositionBuckets buckets_of_bias(NoBias) {
    return {};
}

template <typename T>
void check_bias_gradient(const RelativePositionBias<T>& bias, MatrixView<T> d_table) {
    expect_shape("d_table", d_table.shape(), {bias.buckets.num_buckets, bias.by_distance.extent(0)});
}
inline void check_bias_gradient(NoBias, NoBias) {}
}  // namespace detail

/// T5's relative position bias by distance:
///
///     by_distance[h][span + r] = table[bucket(r)][h]   for |r| <= span = min(reach, max_distance)
///
///     table (num_buckets, h)  →  (h, 2 · span + 1)
///
/// Throws ValueError when the buckets are not as RelativePositionBuckets says, or reach is negative.
template <Policy P, Viewable Table>
auto relative_position_bias(const P& policy, const RelativePositionBuckets& buckets, const Table& table, Index reach) {
    using T = typename Table::value_type;
    detail::check_buckets(buckets);
    expect_value(reach >= 0, "reach", ">= 0", reach);
    expect_shape("table", table.shape(), {buckets.num_buckets, dynamic});
    const Index span = std::min(reach, buckets.max_distance);
    MatrixTensor<accumulate_t<T>, P> by_distance(policy, {table.extent(1), 2 * span + 1});
    relative_position_bias_kernel(policy, by_distance.view(), table.const_view(), buckets);
    return by_distance;
}

/// Vector-Jacobian product: adds to d_table the gradients of all distances in a bucket, in their order.
template <Policy P, Viewable D>
void relative_position_bias_vjp(const P& policy, const RelativePositionBuckets& buckets, const D& d_by_distance,
                                MatrixView<typename D::value_type> d_table) {
    detail::check_buckets(buckets);
    expect_shape("d_table", d_table.shape(), {buckets.num_buckets, d_by_distance.extent(0)});
    expect_value(d_by_distance.extent(1) % 2 == 1, "d_by_distance", "of an odd number of relative positions",
                 d_by_distance.extent(1));
    relative_position_bias_vjp_kernel(policy, d_table, d_by_distance.const_view(), buckets);
}

}  // namespace colt5
