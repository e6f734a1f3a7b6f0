// SPDX-License-Identifier: MIT
#pragma once

#include <type_traits>

#include <colt5/cuda/attention/bias_parts.cuh>
#include <colt5/cuda/attention/dispatch.cuh>
#include <colt5/cuda/attention/key_gradient.cuh>
#include <colt5/cuda/attention/query_gradient.cuh>
#include <colt5/cuda/attention/sliding_backward.cuh>

/// The vector-Jacobian product of attention, in two kernels, or in those of sliding_backward.cuh where they fit. Each
/// block writes rows that no other block writes, without atomic additions, so that the order of all sums is fixed. With
/// s = q·k · scale, p = exp(s − log_sum_exp), dp = value_scale · d_out·v, D = out·d_out:
///
///     ds = p (dp − D),   d_q = scale · ds k,   d_k = scale · dsᵀ q,   d_v = value_scale · pᵀ d_out
namespace colt5::cuda {

/// Assigns what d.d_q, d.d_k, d.d_v and, unless it is null, d.d_value_scale point to. Adds to d_table, of those
/// buckets, if there is a bias.
template <KeyRows keys, Index head, typename T, typename Bias, typename DTable>
void run_attention_backward(const Cuda& policy, const Attention<T>& a, const Bias& bias, const AttentionGradients<T>& d,
                            const DTable& d_table, const RelativePositionBuckets& buckets) {
    // The gradient of a bias is summed from ds in 16 bits, which in float16 can overflow.
    constexpr bool fits = HalfPrecision<T> && (!sliding::has_bias<Bias> || std::is_same_v<T, bfloat16>);
    if constexpr (keys == KeyRows::in_window && fits && (head == sliding::dim || head == dynamic))
        if (a.first <= sliding::tile_rows &&
            sliding::supports(policy, a, sliding::attention_backward<T, Bias>, sliding::backward_threads))
            return sliding::launch_attention_backward(policy, a, bias, d, d_table, buckets);
    const Index queries = static_cast<Index>(a.batch) * a.heads() * a.queries;
    MatrixTensor<accumulate_t<T>, Cuda> query_numbers(policy, {2, queries});
    const QueryNumbers<accumulate_t<T>> numbers{query_numbers.data(), query_numbers.data() + queries};
    with_staging<keys, head, T>(policy, a, [&]<typename Arithmetic, int width, Staging staging>() {
        using ForQueries = BackwardShape<Arithmetic, width, staging, 1>;
        using ForKeys = BackwardShape<Arithmetic, width, staging, 2>;
        const int query_tiles = tiles_of_block<ForQueries>(policy, a, a.queries, ForQueries::tile_rows);
        launch(policy, "attention_query_gradient", attention_query_gradient<ForQueries, Bias>,
               attention_grid(a, a.queries, ForQueries::tile_rows * query_tiles), ForQueries::threads,
               sizeof(typename ForQueries::Shared), a, bias, d, numbers, query_tiles);
        const int key_tiles = tiles_of_block<ForKeys>(policy, a, a.keys, ForKeys::tile_rows);
        const Index rows = Index{ForKeys::tile_rows} * key_tiles, parts = divide_up(a.keys, rows) * ForKeys::warps;
        with_bias_parts<BiasGradient<ForKeys, Bias>>(
            policy, a, parts, bias, d_table, buckets, [&](const Bias& with_parts) {
                launch(policy, "attention_key_gradient", attention_key_gradient<ForKeys, Bias>,
                       attention_grid(a, a.keys, rows), ForKeys::threads,
                       sizeof(typename ForKeys::Shared) + BiasGradient<ForKeys, Bias>::shared_bytes_of_block, a,
                       with_parts, d, numbers, key_tiles);
            });
    });
}

}  // namespace colt5::cuda
