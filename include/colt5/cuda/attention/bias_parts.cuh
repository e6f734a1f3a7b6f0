// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention/bias.cuh>
#include <colt5/cuda/relative_position_bias.cuh>

/// The gradient of a bias: memory for the parts that warps or blocks sum, and their sum.
namespace colt5::cuda {

/// Memory for the parts: run(bias) with it, then add their sums to d_table (num_buckets, heads). Each head of each
/// sequence has `parts` parts. `Gradient` says how many entries a part has by distance, Gradient::part_entries(span).
template <typename Gradient, typename T, typename Run>
void with_bias_parts(const Cuda&, const Attention<T>&, Index, NoBias, NoBias, const RelativePositionBuckets&,
                     const Run& run) {
    run(NoBias());
}
template <typename Gradient, typename T, typename Run>
void with_bias_parts(const Cuda& policy, const Attention<T>& a, Index parts, WindowBias<accumulate_t<T>> bias,
                     MatrixView<accumulate_t<T>> d_table, const RelativePositionBuckets& buckets, const Run& run) {
    using Sum = accumulate_t<T>;
    const Index distances = 2 * Index{bias.span} + 1, stride = Gradient::part_entries(bias.span);
    MatrixTensor<Sum, Cuda> memory(policy, {Index{a.batch} * a.heads() * parts, stride}),
        sums(policy, {a.heads(), distances});
    bias.parts = memory.data();
    run(bias);
    launch_sum_bias_parts<false>(policy, sums.data(), memory.data(), a.batch, a.heads(), parts, distances, stride);
    relative_position_bias_vjp(policy, buckets, sums, d_table);
}
template <typename Gradient, typename T, typename Run>
void with_bias_parts(const Cuda& policy, const Attention<T>& a, Index parts, PositionBias<accumulate_t<T>> bias,
                     MatrixView<accumulate_t<T>> d_table, const RelativePositionBuckets& buckets, const Run& run) {
    const Index distances = 2 * Index{bias.span} + 1, columns = buckets.num_buckets * warp_size;
    VectorTensor<TokenIndex, Cuda> bucket_of(policy, {distances});
    MatrixTensor<accumulate_t<T>, Cuda> memory(policy, {Index{a.batch} * a.heads() * parts, columns});
    launch(policy, "buckets_of_distances", buckets_of_distances<TokenIndex>, blocks_for(distances, bias_threads),
           bias_threads, 0, bucket_of.data(), buckets, Index{bias.span});
    bias.bucket_of = bucket_of.data();
    bias.buckets = static_cast<int>(buckets.num_buckets);
    bias.parts = memory.data();
    run(bias);
    launch_sum_bias_parts<true>(policy, d_table.data(), memory.data(), a.batch, a.heads(), parts, columns, columns);
}
template <typename Gradient, typename T, typename Inner, typename DTable, typename Run>
void with_bias_parts(const Cuda& policy, const Attention<T>& a, Index parts, LimitedBias<Inner> bias,
                     const DTable& d_table, const RelativePositionBuckets& buckets, const Run& run) {
    with_bias_parts<Gradient>(policy, a, parts, bias.inner, d_table, buckets, [&](const Inner& with_parts) {
        bias.inner = with_parts;
        run(bias);
    });
}

}  // namespace colt5::cuda
