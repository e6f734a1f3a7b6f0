// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention/gradients.cuh>
#include <colt5/cuda/attention/sliding/block.cuh>

/// Recomputes, after the kernel of sliding_backward.cuh, the rows of gradients that are NaN or infinite, without the
/// keys and queries that they do not see. See single_rows.cuh.
namespace colt5::cuda::sliding {

/// Groups of 16 rows of which one is NaN or infinite. A group is (sequence · heads + head) · groups of a head + number.
struct GroupList {
    unsigned* count;
    int* groups;

    __device__ void add(int group) const { groups[atomicAdd(count, 1u)] = group; }
};
struct NanGroups {
    GroupList queries, keys;
};

/// The shifts of queries, from their log-sum-exps.
struct ShiftsOf {
    const float* log_sum_exp;

    __device__ float operator[](int query) const { return shift_of(log_sum_exp[query]); }
};

/// Assigns d_q and D of the listed groups. One warp a row.
template <typename T, typename Bias>
__global__ void __launch_bounds__(warpgroup)
    recompute_queries(const GroupList list, const Attention<T> a, const Bias bias, const AttentionGradients<T> d,
                      float* dots) {
    const int groups = (a.queries + 15) / 16;
    for (unsigned i = blockIdx.x; i < *list.count; i += gridDim.x) {
        const int head = list.groups[i] / groups, first = list.groups[i] % groups * 16;
        const int b = head / a.heads(), h = head % a.heads();
        const HeadBias<T, Bias> head_bias(a, AttentionBlock<T>(a, b, h), bias);
        const bool* const mask = a.mask != nullptr ? a.mask + static_cast<Index>(b) * a.keys : nullptr;
        const Rows<const T> k = a.k.at(b, 0, h), v = a.v.at(b, 0, h);
        for (int row = first + warp_id(); row < ::min(first + 16, a.queries); row += warps) {
            const Index at = static_cast<Index>(head) * a.queries + row;
            const MaskedKeyRange range(a.first + row, Reach::of_query(a), a.keys, mask);
            const T *const q = a.q.at(b, 0, h)[row], *const d_out = a.out.with(d.d_out).at(b, 0, h)[row];
            const float shift = shift_of(d.log_sum_exp[at]);
            const float dot =
                out_dot_of_row(q, d_out, k, v, range, shift, a.sees_zeros, a.scale, dim, head_bias.of_query(row));
            if (lane_id() == 0) dots[at] = dot;
            query_gradient_row(d.d_q.at(b, 0, h)[row], q, d_out, k, v, range, static_cast<const float*>(nullptr), shift,
                               dot, a.sees_zeros, a.scale, dim, head_bias.of_query(row));
        }
    }
}
/// Assigns d_k and d_v of the listed groups, after recompute_queries, which corrects D.
template <typename T, typename Bias>
__global__ void __launch_bounds__(warpgroup) recompute_keys(const GroupList list, const Attention<T> a, const Bias bias,
                                                            const AttentionGradients<T> d, const float* dots) {
    const int origin = first_key(a), groups = (a.keys - origin + 15) / 16;
    for (unsigned i = blockIdx.x; i < *list.count; i += gridDim.x) {
        const int head = list.groups[i] / groups, first = origin + list.groups[i] % groups * 16;
        const int b = head / a.heads(), h = head % a.heads();
        const HeadBias<T, Bias> head_bias(a, AttentionBlock<T>(a, b, h), bias);
        const Index queries = static_cast<Index>(head) * a.queries;
        for (int row = ::max(first, 0) + warp_id(); row < ::min(first + 16, a.keys); row += warps) {
            T *const d_k = d.d_k.at(b, 0, h)[row], *const d_v = d.d_v.at(b, 0, h)[row];
            if (a.mask != nullptr && !a.mask[static_cast<Index>(b) * a.keys + row]) {
                LaneEntries<float>().store(d_k, dim);
                LaneEntries<float>().store(d_v, dim);
                continue;
            }
            key_gradient_row(
                d_k, d_v, a.k.at(b, 0, h)[row], a.v.at(b, 0, h)[row], a.q.at(b, 0, h), a.out.with(d.d_out).at(b, 0, h),
                MaskedKeyRange(row - a.first, Reach::of_key(a), a.queries, nullptr), ShiftsOf{d.log_sum_exp + queries},
                dots + queries, 1.0f, a.scale, dim, head_bias.of_key(row));
        }
    }
}

}  // namespace colt5::cuda::sliding
