// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>

#include <colt5/cuda/attention/backward.cuh>
#include <colt5/cuda/attention/forward.cuh>
#include <colt5/op/dense_attention.hpp>

namespace colt5 {

namespace cuda {

template <typename T>
Attention<T> dense_problem(View<const T, dynamic, dynamic, dynamic, dynamic> q,
                           View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv, KeyMask mask,
                           TokensView<const accumulate_t<T>> value_scale) {
    using Sum = accumulate_t<T>;
    const Index batch = q.extent(0), length = q.extent(1), heads = q.extent(2), dim = q.extent(3);
    const Index routes = kv.extent(1), keys = kv.extent(2), per_route = kv.extent(3);
    const auto part = [&](Index i) {
        const Index token = per_route * 2 * dim;
        return Heads<const T>{kv.data() + i * dim, routes * keys * token, keys * token, 2 * dim, token};
    };
    const auto of_queries = [&](const T* data) {
        return Heads<const T>{data, length * heads * dim, per_route * dim, dim, heads * dim};
    };
    attention_extent<T>("heads", heads);
    return {.q = of_queries(q.data()),
            .k = part(0),
            .v = part(1),
            .out = of_queries(nullptr),
            .batch = attention_extent<T>("batch", batch),
            .routes = attention_extent<T>("routes", routes),
            .per_route = attention_extent<T>("heads", per_route),
            .queries = attention_extent<T>("queries", length),
            .keys = attention_extent<T>("keys", keys),
            .dim_head = attention_extent<T>("dim_head", dim),
            .reach = Attention<T>::everything,
            .ahead = Attention<T>::everything,
            .first = 0,
            .mask = mask.data(),
            .value_scale = value_scale.data(),
            .scale = Sum(1) / std::sqrt(static_cast<Sum>(dim)),
            .vectors = dim * static_cast<Index>(sizeof(T)) % 16 == 0 && is_aligned(q.data()) && is_aligned(kv.data())};
}

inline NoBias position_bias(NoBias, Index) {
    return {};
}
template <typename Sum>
PositionBias<Sum> position_bias(const RoutedPositionBias<Sum>& bias, Index dim_head) {
    return {bias.by_distance.data(),
            static_cast<int>(bias.by_distance.extent(1) / 2),
            std::sqrt(static_cast<Sum>(dim_head)),
            bias.query_positions.data(),
            bias.key_positions.data(),
            static_cast<int>(bias.null_keys),
            static_cast<int>(bias.query_positions.extent(1))};
}

template <typename Bias>
auto position_bias(const FirstKeys<Bias>& bias, Index dim_head) {
    const auto inner = position_bias(static_cast<const Bias&>(bias), dim_head);
    return LimitedBias<std::remove_const_t<decltype(inner)>>{inner, bias.counts.data(),
                                                             static_cast<int>(bias.counts.extent(1))};
}

/// d_value_scale (batch, routes, keys) = Σ of `shares` (batch, heads, keys) over the heads of a route, in their order.
template <typename Sum>
__global__ void sum_over_heads(Sum* to, const Sum* shares, Index routes, Index per_route, Index keys) {
    for (Index i = global_thread(); i < routes * keys; i += grid_threads()) {
        const Index route = i / keys, key = i % keys;
        Sum sum = 0;
        for (Index h = 0; h < per_route; ++h) sum += shares[(route * per_route + h) * keys + key];
        to[i] = sum;
    }
}

/// Forward. The problem has the layout of `out`, but no output.
template <KeyRows keys, Index head, typename T, typename Bias>
void run_dense_forward(const Cuda& policy, Attention<T> problem, const Bias& bias, T* out,
                       accumulate_t<T>* log_sum_exp) {
    problem.vectors = problem.vectors && is_aligned(out);
    run_attention_forward<keys, head>(policy, problem, bias, out, log_sum_exp);
}

/// Backward; `d` has what it reads. d_kv (batch, routes, keys, heads of a route, 2, dim_head)
template <KeyRows key_rows, Index head, typename T, typename Bias, typename DTable>
void run_dense_backward(const Cuda& policy, Attention<T> problem, const Bias& bias, T* d_q,
                        View<T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_kv,
                        accumulate_t<T>* d_value_scale, AttentionGradients<T> d, const DTable& d_table,
                        const RelativePositionBuckets& buckets) {
    using Sum = accumulate_t<T>;
    const Index routes = problem.routes, per_route = problem.per_route, keys = problem.keys, batch = problem.batch;
    problem.vectors =
        problem.vectors && is_aligned(d.out) && is_aligned(d.d_out) && is_aligned(d_q) && is_aligned(d_kv.data());
    Tensor<Sum, Cuda, dynamic, dynamic, dynamic> shares;
    if (problem.value_scale != nullptr) shares = {policy, {batch, problem.heads(), keys}};
    d.d_q = problem.q.with(d_q);
    d.d_k = problem.k.with(d_kv.data());
    d.d_k.batch = routes * d.d_k.route;
    d.d_v = d.d_k.with(d_kv.data() + problem.dim_head);
    d.d_value_scale = shares.data();
    run_attention_backward<key_rows, head, T>(policy, problem, bias, d, d_table, buckets);
    if (problem.value_scale == nullptr) return;
    constexpr int threads = 256;
    launch(policy, "sum_over_heads", sum_over_heads<Sum>, blocks_for(batch * routes * keys, threads), threads, 0,
           d_value_scale, shares.data(), batch * routes, per_route, keys);
}

}  // namespace cuda

template <typename T, typename Bias, Index head>
void dense_attention_kernel(const Cuda& policy, View<T, dynamic, dynamic, dynamic, dynamic> out,
                            TokensView<accumulate_t<T>> log_sum_exp, View<const T, dynamic, dynamic, dynamic, head> q,
                            View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv, KeyMask mask,
                            TokensView<const accumulate_t<T>> value_scale, const Bias& bias) {
    cuda::run_dense_forward<cuda::KeyRows::all, head>(policy, cuda::dense_problem(q.view(), kv, mask, value_scale),
                                                      cuda::position_bias(bias, q.extent(3)), out.data(),
                                                      log_sum_exp.data());
}

template <typename T, typename Bias, typename DTable, Index head>
void dense_attention_vjp_kernel(
    const Cuda& policy, View<T, dynamic, dynamic, dynamic, dynamic> d_q,
    View<T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_kv, TokensView<accumulate_t<T>> d_value_scale,
    View<const T, dynamic, dynamic, dynamic, dynamic> d_out, View<const T, dynamic, dynamic, dynamic, dynamic> out,
    TokensView<const accumulate_t<T>> log_sum_exp, View<const T, dynamic, dynamic, dynamic, head> q,
    View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv, KeyMask mask,
    TokensView<const accumulate_t<T>> value_scale, const Bias& bias, const DTable& d_table) {
    cuda::run_dense_backward<cuda::KeyRows::all, head>(
        policy, cuda::dense_problem(q.view(), kv, mask, value_scale), cuda::position_bias(bias, q.extent(3)),
        d_q.data(), d_kv, d_value_scale.data(),
        {.out = out.data(), .d_out = d_out.data(), .log_sum_exp = log_sum_exp.data()}, d_table,
        detail::buckets_of_bias(bias));
}

}  // namespace colt5
