// SPDX-License-Identifier: MIT
#pragma once

#include <type_traits>

#include <colt5/cuda/attention/dispatch.cuh>
#include <colt5/cuda/attention/key_gradient.cuh>
#include <colt5/cuda/attention/query_gradient.cuh>
#include <colt5/cuda/attention/sliding_backward.cuh>
#include <colt5/cuda/relative_position_bias.cuh>

/// The vector-Jacobian product of attention, in two kernels, or in that of sliding_backward.cuh where it fits. Each
/// block writes rows that no other block writes, without atomic additions, so that the order of all sums is fixed. With
/// s = q·k · scale, p = exp(s − log_sum_exp), dp = value_scale · d_out·v, D = out·d_out:
///
///     ds = p (dp − D),   d_q = scale · ds k,   d_k = scale · dsᵀ q,   d_v = value_scale · pᵀ d_out
namespace colt5::cuda {

/// Memory for the parts of the gradient of a bias: run(bias) with it, then add their sums to d_table (num_buckets,
/// heads).
template <typename Shape, typename T, typename Run>
void with_bias_parts(const Cuda&, const Attention<T>&, Index, NoBias, NoBias, const RelativePositionBuckets&,
                     const Run& run) {
    run(NoBias());
}
template <typename Shape, typename T, typename Run>
void with_bias_parts(const Cuda& policy, const Attention<T>& a, Index parts, WindowBias<accumulate_t<T>> bias,
                     MatrixView<accumulate_t<T>> d_table, const RelativePositionBuckets& buckets, const Run& run) {
    using Sum = accumulate_t<T>;
    const Index distances = 2 * Index{bias.span} + 1;
    const Index stride = BiasGradient<Shape, WindowBias<Sum>>::part_entries(bias.span);
    MatrixTensor<Sum, Cuda> memory(policy, {Index{a.batch} * a.heads() * parts, stride}),
        sums(policy, {a.heads(), distances});
    bias.parts = memory.data();
    run(bias);
    launch_sum_bias_parts<false>(policy, sums.data(), memory.data(), a.batch, a.heads(), parts, distances, stride);
    relative_position_bias_vjp(policy, buckets, sums, d_table);
}
template <typename Shape, typename T, typename Run>
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

template <typename Shape, typename T, typename Inner, typename DTable, typename Run>
void with_bias_parts(const Cuda& policy, const Attention<T>& a, Index parts, LimitedBias<Inner> bias,
                     const DTable& d_table, const RelativePositionBuckets& buckets, const Run& run) {
    with_bias_parts<Shape>(policy, a, parts, bias.inner, d_table, buckets, [&](const Inner& with_parts) {
        bias.inner = with_parts;
        run(bias);
    });
}

/// Assigns what d.d_q, d.d_k, d.d_v and, unless it is null, d.d_value_scale point to. Adds to d_table, of those
/// buckets, if there is a bias.
template <bool window, Index head, typename T, typename Bias, typename DTable>
void run_attention_backward(const Cuda& policy, const Attention<T>& a, const Bias& bias, const AttentionGradients<T>& d,
                            const DTable& d_table, const RelativePositionBuckets& buckets) {
    if constexpr (window && HalfPrecision<T> && std::is_same_v<Bias, NoBias> &&
                  (head == sliding::dim || head == dynamic))
        if (a.queries > 0 && sliding::supports(policy, a)) return sliding::launch_attention_backward(policy, a, d);
    const Index queries = static_cast<Index>(a.batch) * a.heads() * a.queries;
    MatrixTensor<accumulate_t<T>, Cuda> query_numbers(policy, {2, queries});
    const QueryNumbers<accumulate_t<T>> numbers{query_numbers.data(), query_numbers.data() + queries};
    with_staging<window, head, T>(policy, a, [&]<typename Arithmetic, int width, Staging staging>() {
        using ForQueries = BackwardShape<Arithmetic, width, staging, 1>;
        using ForKeys = BackwardShape<Arithmetic, width, staging, 2>;
        const int query_tiles = tiles_of_block<ForQueries>(policy, a, a.queries, ForQueries::tile_rows);
        launch(policy, "attention_query_gradient", attention_query_gradient<ForQueries, Bias>,
               attention_grid(a, a.queries, ForQueries::tile_rows * query_tiles), ForQueries::threads,
               sizeof(typename ForQueries::Shared), a, bias, d, numbers, query_tiles);
        const int key_tiles = tiles_of_block<ForKeys>(policy, a, a.keys, ForKeys::tile_rows);
        const Index rows = Index{ForKeys::tile_rows} * key_tiles, parts = divide_up(a.keys, rows) * ForKeys::warps;
        with_bias_parts<ForKeys>(policy, a, parts, bias, d_table, buckets, [&](const Bias& with_parts) {
            launch(policy, "attention_key_gradient", attention_key_gradient<ForKeys, Bias>,
                   attention_grid(a, a.keys, rows), ForKeys::threads,
                   sizeof(typename ForKeys::Shared) + BiasGradient<ForKeys, Bias>::shared_bytes_of_block, a, with_parts,
                   d, numbers, key_tiles);
        });
    });
}

}  // namespace colt5::cuda
