// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>

#include <colt5/cuda/column_sums.cuh>
#include <colt5/cuda/expr.cuh>
#include <colt5/cuda/kernel.cuh>
#include <colt5/op/null_query.hpp>

namespace colt5 {

namespace cuda {

/// unrouted = mask, or true where there is none
template <typename Bool>
__global__ void all_tokens(Bool* unrouted, const Bool* mask, Index count) {
    for (Index i = global_thread(); i < count; i += grid_threads()) unrouted[i] = mask == nullptr || mask[i];
}
/// unrouted = false at the chosen tokens
template <typename Bool>
__global__ void mark_routed(Bool* unrouted, const TokenIndex* indices, const Bool* live, Index picks, Index length,
                            Index count) {
    for (Index i = global_thread(); i < count; i += grid_threads())
        if (live == nullptr || live[i]) unrouted[i / picks * length + indices[i]] = false;
}

/// partial[block, column] = Σ over a block's unrouted rows of d_out. A block covers `lanes` packs of columns, and
/// sum_threads / lanes rows at a time.
template <typename T, int width>
__global__ void __launch_bounds__(sum_threads)
    sum_unrouted_rows(accumulate_t<T>* partial, const T* d_out, const bool* unrouted, Index rows, Index rows_each,
                      Index columns, int lanes) {
    using Sum = accumulate_t<T>;
    __shared__ Sum shared[sum_threads][width];
    const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
    const int groups = sum_threads / lanes;
    const Index end = ::min(rows, (blockIdx.x + 1) * rows_each);
    for (Index first = 0; first < columns; first += lanes * width) {
        const Index column = first + lane * width;
        const bool mine = column < columns;
        Sum sum[width] = {};
        if (mine)
#pragma unroll 4
            for (Index row = blockIdx.x * rows_each + group; row < end; row += groups) {
                if (!unrouted[row]) continue;
                const auto pack = load_pack<width>(d_out + row * columns + column);
                for (int e = 0; e < width; ++e) sum[e] += static_cast<Sum>(pack.values[e]);
            }
        sum_over_groups(partial + blockIdx.x * columns + column, sum, shared, lanes, mine);
    }
}

}  // namespace cuda

/// Indices are not checked: those out of range write out of bounds.
template <std::same_as<bool> Bool>
void unrouted_tokens_kernel(const Cuda& policy, View<Bool, dynamic, dynamic> unrouted,
                            MatrixView<const TokenIndex> indices, Mask mask, Mask live) {
    constexpr int threads = 256;
    cuda::launch(policy, "all_tokens", cuda::all_tokens<bool>, cuda::blocks_for(unrouted.size(), threads), threads, 0,
                 unrouted.data(), mask.data(), unrouted.size());
    cuda::launch(policy, "mark_routed", cuda::mark_routed<bool>, cuda::blocks_for(indices.size(), threads), threads, 0,
                 unrouted.data(), indices.data(), live.data(), indices.extent(1), unrouted.extent(1), indices.size());
}

template <typename T>
void null_query_vjp_kernel(const Cuda& policy, VectorView<accumulate_t<T>> d_null_token, TokensView<const T> d_out,
                           Mask unrouted) {
    const Index columns = d_out.extent(2), rows = unrouted.size();
    const cuda::RowShares shares(rows);
    MatrixTensor<accumulate_t<T>, Cuda> partial(policy, {shares.blocks, columns});
    cuda::with_pack_size<T>(
        columns,
        [&]<int width>(std::integral_constant<int, width>) {
            cuda::launch(policy, "sum_unrouted_rows", cuda::sum_unrouted_rows<T, width>, cuda::grid(shares.blocks),
                         cuda::sum_threads, 0, partial.data(), d_out.data(), unrouted.data(), rows, shares.rows_each,
                         columns, cuda::lanes_of_columns(columns, width));
        },
        d_out.data());
    cuda::launch_add_partials(policy, cuda::Totals<accumulate_t<T>, 1>{{d_null_token.data()}, columns}, partial.data(),
                              shares.blocks);
}

}  // namespace colt5
