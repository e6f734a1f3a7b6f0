// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <colt5/cuda/attention_backward.cuh>
#include <colt5/cuda/attention_forward.cuh>
#include <colt5/op/local_attention.hpp>

namespace colt5 {

namespace cuda {

template <typename T>
Attention<T> local_problem(View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> qkv, Mask mask, Index reach) {
    using Sum = accumulate_t<T>;
    const Index batch = qkv.extent(0), length = qkv.extent(1), heads = qkv.extent(3), dim = qkv.extent(4);
    const Index all = heads * dim;
    const auto part = [&](Index i) { return Heads<const T>{qkv.data() + i * all, length * 3 * all, 0, dim, 3 * all}; };
    return {.q = part(0),
            .k = part(1),
            .v = part(2),
            .out = {nullptr, length * all, 0, dim, all},
            .batch = static_cast<int>(batch),
            .routes = 1,
            .per_route = static_cast<int>(heads),
            .queries = static_cast<int>(length),
            .keys = static_cast<int>(length),
            .dim_head = static_cast<int>(dim),
            .reach = static_cast<int>(std::min(reach, Index{Attention<T>::everything})),
            .mask = mask.data(),
            .value_scale = nullptr,
            .scale = Sum(1) / std::sqrt(static_cast<Sum>(dim)),
            .vectors = dim * static_cast<Index>(sizeof(T)) % 16 == 0 && is_aligned(qkv.data())};
}

/// The slots of the three windows around token i, as in MaskedRows::window_mean: those of tokens, and how many belong
/// to whole windows beyond the sequence.
struct WindowSlots {
    __device__ WindowSlots(Index i, Index window, Index length) {
        const Index first = (i / window - 1) * window, last = (i / window + 2) * window;
        const Index grid = divide_up(length, window) * window;
        begin = ::max(Index{0}, first);
        end = ::min(length, last);
        out_of_grid = ::max(Index{0}, -first) + ::max(Index{0}, last - grid);
    }
    Index begin, end, out_of_grid;
};

/// A block a token and head. Rows that saw no key get the mean of their windows' values.
template <typename T>
__global__ void window_mean(const Attention<T> a, const accumulate_t<T>* log_sum_exp, T* out) {
    using Sum = accumulate_t<T>;
    const AttentionBlock<T> block(a, 1);
    const int i = block.first;
    if (log_sum_exp[block.of_queries(a) + i] != -std::numeric_limits<Sum>::infinity()) return;
    const WindowSlots slots(i, a.reach, a.keys);
    const Rows<const T> v = block.rows(a, a.v);
    const Rows<T> to = block.rows(a, a.out.with(out));
    for (int e = static_cast<int>(threadIdx.x); e < a.dim_head; e += static_cast<int>(blockDim.x)) {
        Sum sum = -static_cast<Sum>(slots.out_of_grid);
        for (Index j = slots.begin; j < slots.end; ++j) sum += static_cast<Sum>(v[static_cast<int>(j)][e]);
        to[i][e] = static_cast<T>(sum / static_cast<Sum>(3 * static_cast<Index>(a.reach)));
    }
}

/// Its gradient, added to d_v. Windows are neighbours of each other in both directions, so that the rows that read
/// token j are those of the windows around it.
template <typename T>
__global__ void window_mean_gradient(const Attention<T> a, const accumulate_t<T>* log_sum_exps, const T* d_out,
                                     T* d_v) {
    using Sum = accumulate_t<T>;
    const AttentionBlock<T> block(a, 1);
    const int j = block.first;
    const WindowSlots slots(j, a.reach, a.keys);
    const Rows<const T> from = block.rows(a, a.out.with(d_out));
    const Rows<T> to = block.rows(a, a.v.with(d_v));
    const Sum* const log_sum_exp = log_sum_exps + block.of_queries(a);
    for (int e = static_cast<int>(threadIdx.x); e < a.dim_head; e += static_cast<int>(blockDim.x)) {
        Sum sum = 0;
        for (Index i = slots.begin; i < slots.end; ++i)
            if (log_sum_exp[i] == -std::numeric_limits<Sum>::infinity())
                sum += static_cast<Sum>(from[static_cast<int>(i)][e]);
        if (sum != Sum(0))
            to[j][e] =
                static_cast<T>(static_cast<Sum>(to[j][e]) + sum / static_cast<Sum>(3 * static_cast<Index>(a.reach)));
    }
}

}  // namespace cuda

template <typename T>
void local_attention_kernel(const Cuda& policy, View<T, dynamic, dynamic, dynamic, dynamic> out,
                            TokensView<accumulate_t<T>> log_sum_exp,
                            View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> qkv, Mask mask,
                            const LocalAttention& attention) {
    const bool window_mean = attention.masked_rows == MaskedRows::window_mean && mask;
    Tensor<accumulate_t<T>, Cuda, dynamic, dynamic, dynamic> kept;
    if (window_mean && !log_sum_exp) {
        kept = {policy, {qkv.extent(0), qkv.extent(3), qkv.extent(1)}};
        log_sum_exp = kept.view();
    }
    auto problem = cuda::local_problem(qkv, mask, attention.reach);
    problem.vectors = problem.vectors && cuda::is_aligned(out.data());
    cuda::run_attention_forward<true>(policy, problem, out.data(), log_sum_exp.data());
    if (!window_mean) return;
    cuda::launch(policy, "window_mean", cuda::window_mean<T>, cuda::attention_grid(problem, qkv.extent(1), 1),
                 cuda::warp_size, 0, problem, log_sum_exp.data(), out.data());
}

template <typename T>
void local_attention_vjp_kernel(const Cuda& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic> d_qkv,
                                View<const T, dynamic, dynamic, dynamic, dynamic> d_out,
                                View<const T, dynamic, dynamic, dynamic, dynamic> out,
                                TokensView<const accumulate_t<T>> log_sum_exp,
                                View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> qkv, Mask mask,
                                const LocalAttention& attention) {
    auto problem = cuda::local_problem(qkv, mask, attention.reach);
    problem.vectors = problem.vectors && cuda::is_aligned(d_qkv.data()) && cuda::is_aligned(d_out.data()) &&
                      cuda::is_aligned(out.data());
    const Index part = qkv.extent(3) * qkv.extent(4);
    T* const d_v = d_qkv.data() + 2 * part;
    cuda::run_attention_backward<true, T>(policy, problem,
                                          {.out = out.data(),
                                           .d_out = d_out.data(),
                                           .log_sum_exp = log_sum_exp.data(),
                                           .d_q = d_qkv.data(),
                                           .d_k = d_qkv.data() + part,
                                           .d_v = d_v,
                                           .d_value_scale = nullptr});
    if (attention.masked_rows == MaskedRows::zero || !mask) return;
    cuda::launch(policy, "window_mean_gradient", cuda::window_mean_gradient<T>,
                 cuda::attention_grid(problem, qkv.extent(1), 1), cuda::warp_size, 0, problem, log_sum_exp.data(),
                 d_out.data(), d_v);
}

}  // namespace colt5
