// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention_key_gradient.cuh>
#include <colt5/cuda/attention_query_gradient.cuh>

/// The vector-Jacobian product of attention, in two kernels that each own what they write, so that nothing is added in
/// an order that varies. With s = q·k · scale, p = exp(s − log_sum_exp), dp = value_scale · d_out·v, D = out·d_out:
///
///     ds = p (dp − D),   d_q = scale · ds k,   d_k = scale · dsᵀ q,   d_v = value_scale · pᵀ d_out
namespace colt5::cuda {

/// Assigns what d.d_q, d.d_k, d.d_v and, unless it is null, d.d_value_scale point to.
template <bool window, typename T>
void run_attention_backward(const Cuda& policy, const Attention<T>& a, const AttentionGradients<T>& d) {
    const Index queries = static_cast<Index>(a.batch) * a.heads() * a.queries;
    MatrixTensor<accumulate_t<T>, Cuda> of_queries(policy, {2, queries});
    const QueryNumbers<accumulate_t<T>> numbers{of_queries.data(), of_queries.data() + queries};
    with_passing<window, T>(policy, a, [&]<typename Arithmetic, int width, Passing passing>() {
        using ForQueries = BackwardShape<Arithmetic, width, passing, 1>;
        using ForKeys = BackwardShape<Arithmetic, width, passing, 2>;
        const int query_tiles = tiles_of_block<ForQueries>(policy, a, a.queries, ForQueries::own);
        launch(policy, "attention_query_gradient", attention_query_gradient<ForQueries>,
               attention_grid(a, a.queries, ForQueries::own * query_tiles), ForQueries::threads,
               sizeof(typename ForQueries::Shared), a, d, numbers, query_tiles);
        const int key_tiles = tiles_of_block<ForKeys>(policy, a, a.keys, ForKeys::own);
        launch(policy, "attention_key_gradient", attention_key_gradient<ForKeys>,
               attention_grid(a, a.keys, ForKeys::own * key_tiles), ForKeys::threads, sizeof(typename ForKeys::Shared),
               a, d, numbers, key_tiles);
    });
}

}  // namespace colt5::cuda
