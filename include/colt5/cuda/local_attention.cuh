// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <colt5/cuda/attention/backward.cuh>
#include <colt5/cuda/attention/forward.cuh>
#include <colt5/cuda/kernel.cuh>
#include <colt5/cuda/traits.cuh>
#include <colt5/cuda/zero.cuh>
#include <colt5/op/local_attention.hpp>

namespace colt5 {

namespace cuda {

/// The problem of the queries from token `first` on, and of the `keys` keys from token `key` on.
template <typename T>
Attention<T> local_problem(View<const T, dynamic, dynamic, dynamic, dynamic> q,
                           View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> kv, Mask mask, Index first,
                           Index key, Index keys, const LocalAttention& attention) {
    using Sum = accumulate_t<T>;
    const Index batch = q.extent(0), queries = q.extent(1), heads = q.extent(2), dim = q.extent(3), all = heads * dim;
    const int reach = static_cast<int>(std::min(attention.reach, Index{Attention<T>::everything} - 1));
    const auto of_queries = [&](const T* data) { return Heads<const T>{data, queries * all, 0, dim, all}; };
    const auto of_keys = [&](Index part) {
        return Heads<const T>{kv.data() + (2 * key + part) * all, kv.extent(1) * 2 * all, 0, dim, 2 * all};
    };
    return {.q = of_queries(q.data()),
            .k = of_keys(0),
            .v = of_keys(1),
            .out = of_queries(nullptr),
            .batch = attention_extent<T>("batch", batch),
            .routes = 1,
            .per_route = attention_extent<T>("heads", heads),
            .queries = attention_extent<T>("queries", queries),
            .keys = attention_extent<T>("keys", keys),
            .dim_head = attention_extent<T>("dim_head", dim),
            .reach = reach,
            .ahead = attention.causal ? 0 : reach,
            .first = attention_extent<T>("first", first - key),
            .mask = mask ? mask.data() + key : nullptr,  // key is 0 unless there is one sequence
            .value_scale = nullptr,
            .scale = Sum(1) / std::sqrt(static_cast<Sum>(dim)),
            .vectors = dim * static_cast<Index>(sizeof(T)) % 16 == 0 && is_aligned(q.data()) && is_aligned(kv.data()),
            .sees_zeros = attention.sees_padding(mask, first + queries, key + keys)};
}

inline NoBias window_bias(NoBias, Index) {
    return {};
}
template <typename Sum>
WindowBias<Sum> window_bias(const RelativePositionBias<Sum>& bias, Index dim_head) {
    return {bias.by_distance.data(), static_cast<int>(bias.by_distance.extent(1) / 2),
            std::sqrt(static_cast<Sum>(dim_head))};
}

/// Gives each query without a visible key the mean of the values in its windows. One block for each query and head; `a`
/// has all keys of the sequence.
template <typename T>
__global__ void window_mean(const Attention<T> a, const accumulate_t<T>* log_sum_exp, T* out) {
    using Sum = accumulate_t<T>;
    const AttentionBlock<T> block(a, 1);
    if (block.is_beyond(a)) return;
    const int i = block.first;
    if (log_sum_exp[block.of_queries(a) + i] != -std::numeric_limits<Sum>::infinity()) return;
    const WindowSlots slots(a.first + i, a.reach, a.keys);
    const Rows<const T> v = block.rows(a, a.v);
    const Rows<T> to = block.rows(a, a.out.with(out));
    const bool* const mask = block.mask(a);  // values of masked keys that are not finite count as 0
    for (int e = static_cast<int>(threadIdx.x); e < a.dim_head; e += static_cast<int>(blockDim.x)) {
        Sum sum = -static_cast<Sum>(slots.out_of_grid);
        for (Index j = slots.begin; j < slots.end; ++j) {
            const T value = v[static_cast<int>(j)][e];
            sum += static_cast<Sum>(is_padding(mask, j) ? finite_or_zero(value) : value);
        }
        to[i][e] = static_cast<T>(sum / static_cast<Sum>(3 * static_cast<Index>(a.reach)));
    }
}

/// LocalAttention::attends_to_padding: corrects the outputs and log-sum-exps of the queries that see keys of 0 behind
/// the sequence. One block for each query and head; `a` has all keys of the sequence.
template <typename T>
__global__ void attend_to_padding(const Attention<T> a, Index reach, accumulate_t<T>* log_sum_exps, T* out) {
    using Sum = accumulate_t<T>;
    const AttentionBlock<T> block(a, 1);
    if (block.is_beyond(a)) return;
    const int i = block.first;
    const Index keys = LocalAttention::padding_seen(a.first + i, a.keys, reach);
    if (keys == 0) return;
    Sum& log_sum_exp = log_sum_exps[block.of_queries(a) + i];
    const Sum before = log_sum_exp, largest = ::max(before, Sum(0));
    const Sum sum = largest + ::log(::exp(before - largest) + static_cast<Sum>(keys) * ::exp(-largest));
    const Sum share = ::exp(before - sum);
    const Rows<T> to = block.rows(a, a.out.with(out));
    for (int e = static_cast<int>(threadIdx.x); e < a.dim_head; e += static_cast<int>(blockDim.x))
        to[i][e] = static_cast<T>(static_cast<Sum>(to[i][e]) * share);
    __syncthreads();
    if (threadIdx.x == 0) log_sum_exp = sum;
}

/// The gradient of window_mean, added to d_v, whose first row belongs to token `origin`. One block for each row and
/// head. The relation is symmetric: the queries whose windows hold token j are those in the windows around j.
template <typename T>
__global__ void window_mean_gradient(const Attention<T> a, const accumulate_t<T>* log_sum_exps, const T* d_out,
                                     const Heads<T> d_v, int origin) {
    using Sum = accumulate_t<T>;
    const AttentionBlock<T> block(a, 1);
    if (block.is_beyond(a)) return;
    const int row = block.first;
    const WindowSlots slots(origin + row, a.reach, a.keys);
    const int begin = ::max(static_cast<int>(slots.begin) - a.first, 0);
    const int end = ::min(static_cast<int>(slots.end) - a.first, a.queries);
    const Rows<const T> from = block.rows(a, a.out.with(d_out));
    const Rows<T> to = block.rows(a, d_v);
    const Sum* const log_sum_exp = log_sum_exps + block.of_queries(a);
    for (int e = static_cast<int>(threadIdx.x); e < a.dim_head; e += static_cast<int>(blockDim.x)) {
        Sum sum = 0;
        for (int i = begin; i < end; ++i)
            if (log_sum_exp[i] == -std::numeric_limits<Sum>::infinity()) sum += static_cast<Sum>(from[i][e]);
        if (sum != Sum(0))
            to[row][e] =
                static_cast<T>(static_cast<Sum>(to[row][e]) + sum / static_cast<Sum>(3 * static_cast<Index>(a.reach)));
    }
}

/// Adds `copy` (rows, 2 · columns) to the last two thirds of each row of `to` (rows, 3 · columns): the gradients of
/// keys and values that earlier chunks of tokens left there.
template <typename T>
__global__ void add_keys_and_values(T* to, const T* copy, Index rows, Index columns) {
    using Sum = accumulate_t<T>;
    for (Index item = global_thread(); item < rows * 2 * columns; item += grid_threads()) {
        const Index at = item / (2 * columns) * 3 * columns + columns + item % (2 * columns);
        to[at] = static_cast<T>(static_cast<Sum>(to[at]) + static_cast<Sum>(copy[item]));
    }
}

}  // namespace cuda

template <typename T, typename Bias, Index head>
void local_attention_kernel(const Cuda& policy, View<T, dynamic, dynamic, dynamic, dynamic> out,
                            TokensView<accumulate_t<T>> log_sum_exp, View<const T, dynamic, dynamic, dynamic, head> q,
                            View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> kv, Mask mask, Index first,
                            const LocalAttention& attention, const Bias& bias) {
    const bool window_mean = attention.masked_rows == MaskedRows::window_mean && mask;
    Tensor<accumulate_t<T>, Cuda, dynamic, dynamic, dynamic> log_sum_exp_memory;
    const bool sees_padding = attention.sees_padding(mask, first + q.extent(1), kv.extent(1));
    if ((window_mean || sees_padding) && !log_sum_exp) {
        log_sum_exp_memory = {policy, {q.extent(0), q.extent(2), q.extent(1)}};
        log_sum_exp = log_sum_exp_memory.view();
    }
    // Causal attention has no keys after its last query.
    const Index keys = attention.causal ? first + q.extent(1) : kv.extent(1);
    auto problem = cuda::local_problem(q.view(), kv, mask, first, 0, keys, attention);
    problem.vectors = problem.vectors && cuda::is_aligned(out.data());
    cuda::run_attention_forward<cuda::KeyRows::in_window, head>(policy, problem, cuda::window_bias(bias, q.extent(3)),
                                                                out.data(), log_sum_exp.data());
    if (sees_padding)
        cuda::launch(policy, "attend_to_padding", cuda::attend_to_padding<T>,
                     cuda::attention_grid(problem, q.extent(1), 1), cuda::warp_size, 0, problem, attention.reach,
                     log_sum_exp.data(), out.data());
    if (!window_mean) return;
    cuda::launch(policy, "window_mean", cuda::window_mean<T>, cuda::attention_grid(problem, q.extent(1), 1),
                 cuda::warp_size, 0, problem, log_sum_exp.data(), out.data());
}

template <typename T, typename Bias, typename DTable, Index head>
void local_attention_vjp_kernel(const Cuda& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic> d_qkv,
                                View<const T, dynamic, dynamic, dynamic, dynamic> d_out,
                                View<const T, dynamic, dynamic, dynamic, dynamic> out,
                                TokensView<const accumulate_t<T>> log_sum_exp,
                                View<const T, dynamic, dynamic, dynamic, head> q,
                                View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> kv, Mask mask, Index first,
                                Index carried, const LocalAttention& attention, const Bias& bias,
                                const DTable& d_table) {
    const Index queries = q.extent(1), length = kv.extent(1), all = q.extent(2) * q.extent(3), row = 3 * all;
    // Ranges of tokens: d_qkv has the rows [origin, last), the key range of the queries is [key, key_end), and the rows
    // before carried_end hold gradients of keys and values.
    const Index origin = attention.window_begin(first), last = origin + d_qkv.extent(1);
    const Index key = std::max(Index{0}, first - attention.reach);
    const Index key_end = std::min(length, first + queries + (attention.causal ? 0 : attention.reach));
    const Index carried_end = origin + carried;
    const auto row_of = [&](Index token) { return d_qkv.data() + (token - origin) * row; };
    const auto part = [&](Index token, Index i) {
        return cuda::Heads<T>{row_of(token) + i * all, d_qkv.extent(1) * row, 0, q.extent(3), row};
    };

    const Index rows_to_add = std::min(carried_end, key_end) - key;
    MatrixTensor<T, Cuda> earlier(policy, {std::max(Index{0}, rows_to_add), 2 * all});
    const std::size_t bytes = static_cast<std::size_t>(all) * sizeof(T);
    if (earlier.size() > 0) {
        const cuda::DeviceGuard guard(policy.device());
        cuda::check(cudaMemcpy2DAsync(earlier.data(), 2 * bytes, row_of(key) + all, 3 * bytes, 2 * bytes,
                                      static_cast<std::size_t>(rows_to_add), cudaMemcpyDeviceToDevice, policy.stream()),
                    "cudaMemcpy2DAsync");
    }
    // Rows of the halo that no query reaches.
    if (carried_end < key) {
        const cuda::DeviceGuard guard(policy.device());
        cuda::check(cudaMemset2DAsync(row_of(carried_end) + all, 3 * bytes, 0, 2 * bytes,
                                      static_cast<std::size_t>(key - carried_end), policy.stream()),
                    "cudaMemset2DAsync");
    }
    const Index untouched = std::max(carried_end, key_end);
    if (untouched < last) {
        VectorView<T> rest(row_of(untouched), {(last - untouched) * row});
        set_zero(policy, rest);
    }

    auto problem = cuda::local_problem(q.view(), kv, mask, first, key, key_end - key, attention);
    problem.vectors = problem.vectors && cuda::is_aligned(d_qkv.data()) && cuda::is_aligned(d_out.data()) &&
                      cuda::is_aligned(out.data());
    cuda::run_attention_backward<cuda::KeyRows::in_window, head, T>(policy, problem,
                                                                    cuda::window_bias(bias, q.extent(3)),
                                                                    {.out = out.data(),
                                                                     .d_out = d_out.data(),
                                                                     .log_sum_exp = log_sum_exp.data(),
                                                                     .d_q = part(first, 0),
                                                                     .d_k = part(key, 1),
                                                                     .d_v = part(key, 2),
                                                                     .d_value_scale = nullptr},
                                                                    d_table, detail::buckets_of_bias(bias));
    if (earlier.size() > 0)
        cuda::launch(policy, "add_keys_and_values", cuda::add_keys_and_values<T>, cuda::blocks_for(earlier.size(), 256),
                     256, 0, row_of(key), earlier.data(), earlier.extent(0), all);
    if (attention.masked_rows == MaskedRows::zero || !mask) return;
    const auto whole = cuda::local_problem(q.view(), kv, mask, first, 0, length, attention);
    cuda::launch(policy, "window_mean_gradient", cuda::window_mean_gradient<T>,
                 cuda::attention_grid(whole, d_qkv.extent(1), 1), cuda::warp_size, 0, whole, log_sum_exp.data(),
                 d_out.data(), part(origin, 2), cuda::attention_extent<T>("first", origin));
}

}  // namespace colt5
