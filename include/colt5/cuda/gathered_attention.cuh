// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/cuda/dense_attention.cuh>
#include <colt5/op/gathered_attention.hpp>

namespace colt5 {

namespace cuda {

/// The problem of dense attention whose keys are at `indices`. All batch entries read the same rows of kv (N, h, 2,
/// dim_head).
template <typename T>
Attention<T> gathered_problem(View<const T, dynamic, dynamic, dynamic, dynamic> q,
                              View<const T, dynamic, dynamic, dynamic, dynamic> kv,
                              TokensView<const TokenIndex> indices, KeyMask mask,
                              TokensView<const accumulate_t<T>> value_scale) {
    using Keys = View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic>;
    const std::array<Index, 6> shape{q.extent(0), 1, indices.extent(2), q.extent(2), 2, q.extent(3)};
    auto problem = dense_problem(q, Keys::unchecked(kv.data(), shape), mask, value_scale);
    problem.k.batch = problem.v.batch = 0;
    problem.picks = indices.data();
    return problem;
}

}  // namespace cuda

template <typename T>
void gathered_attention_kernel(const Cuda& policy, View<T, dynamic, dynamic, dynamic, dynamic> out,
                               TokensView<accumulate_t<T>> log_sum_exp,
                               View<const T, dynamic, dynamic, dynamic, dynamic> q,
                               View<const T, dynamic, dynamic, dynamic, dynamic> kv,
                               TokensView<const TokenIndex> indices, KeyMask mask,
                               TokensView<const accumulate_t<T>> value_scale) {
    cuda::run_dense_forward<cuda::KeyRows::picked, dynamic>(
        policy, cuda::gathered_problem(q, kv, indices, mask, value_scale), NoBias(), out.data(), log_sum_exp.data());
}

template <typename T>
void gathered_attention_vjp_kernel(
    const Cuda& policy, View<T, dynamic, dynamic, dynamic, dynamic> d_q,
    View<T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_kv, TokensView<accumulate_t<T>> d_value_scale,
    View<const T, dynamic, dynamic, dynamic, dynamic> d_out, View<const T, dynamic, dynamic, dynamic, dynamic> out,
    TokensView<const accumulate_t<T>> log_sum_exp, View<const T, dynamic, dynamic, dynamic, dynamic> q,
    View<const T, dynamic, dynamic, dynamic, dynamic> kv, TokensView<const TokenIndex> indices, KeyMask mask,
    TokensView<const accumulate_t<T>> value_scale) {
    cuda::run_dense_backward<cuda::KeyRows::picked, dynamic>(
        policy, cuda::gathered_problem(q, kv, indices, mask, value_scale), NoBias(), d_q.data(), d_kv,
        d_value_scale.data(), {.out = out.data(), .d_out = d_out.data(), .log_sum_exp = log_sum_exp.data()}, NoBias(),
        {});
}

}  // namespace colt5
