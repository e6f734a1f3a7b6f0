// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention_key_gradient.cuh>
#include <colt5/cuda/attention_query_gradient.cuh>

/// The vector-Jacobian product of attention, in two kernels. Each block writes rows that no other block writes, without
/// atomic additions, so that the order of all sums is fixed. With s = q·k · scale, p = exp(s − log_sum_exp), dp =
/// value_scale · d_out·v, D = out·d_out:
///
///     ds = p (dp − D),   d_q = scale · ds k,   d_k = scale · dsᵀ q,   d_v = value_scale · pᵀ d_out
namespace colt5::cuda {

/// Assigns what d.d_q, d.d_k, d.d_v and, unless it is null, d.d_value_scale point to.
template <bool window, typename T>
void run_attention_backward(const Cuda& policy, const Attention<T>& a, const AttentionGradients<T>& d) {
    const Index queries = static_cast<Index>(a.batch) * a.heads() * a.queries;
    MatrixTensor<accumulate_t<T>, Cuda> query_numbers(policy, {2, queries});
    const QueryNumbers<accumulate_t<T>> numbers{query_numbers.data(), query_numbers.data() + queries};
    with_staging<window, T>(policy, a, [&]<typename Arithmetic, int width, Staging staging>() {
        using ForQueries = BackwardShape<Arithmetic, width, staging, 1>;
        using ForKeys = BackwardShape<Arithmetic, width, staging, 2>;
        const int query_tiles = tiles_of_block<ForQueries>(policy, a, a.queries, ForQueries::tile_rows);
        launch(policy, "attention_query_gradient", attention_query_gradient<ForQueries>,
               attention_grid(a, a.queries, ForQueries::tile_rows * query_tiles), ForQueries::threads,
               sizeof(typename ForQueries::Shared), a, d, numbers, query_tiles);
        const int key_tiles = tiles_of_block<ForKeys>(policy, a, a.keys, ForKeys::tile_rows);
        launch(policy, "attention_key_gradient", attention_key_gradient<ForKeys>,
               attention_grid(a, a.keys, ForKeys::tile_rows * key_tiles), ForKeys::threads,
               sizeof(typename ForKeys::Shared), a, d, numbers, key_tiles);
    });
}

}  // namespace colt5::cuda
