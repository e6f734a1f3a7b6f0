// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <colt5/cpu/local_queries.hpp>
#include <colt5/cpu/relative_position_bias.hpp>
#include <colt5/cpu/traits.hpp>
#include <colt5/op/local_attention.hpp>

namespace colt5 {

namespace cpu {

/// to = row, or with `add` to += row
template <typename T>
void copy_row(bool add, const T* row, Index dim, T* to) {
    for_each_batch<T>(dim, [&](Index e, Index width) {
        const Batch<T> x = load(row + e, width);
        store(to + e, add ? load(to + e, width) + x : x, width);
    });
}

/// The number of queries of a segment; one task computes one segment of one head. It does not depend on the number of
/// threads. The window of a segment is the keys within reach of its queries. The windows of two segments that are not
/// neighbours are disjoint.
template <typename T>
Index local_segment(Index reach, Index queries) {
    return round_up(std::max(Index{512}, 2 * std::min(reach, queries)), LocalTile<T>::queries);
}

/// Assigns to `out` the MaskedRows::window_mean of token i, which saw no key. `window` is the reach. In masked tokens,
/// values that are not finite count as 0.
template <typename T>
void window_mean(const LocalHead<T>& head, Index window, Index i, T* out) {
    const WindowSlots slots(i, window, head.length);
    std::fill_n(out, head.dim, -static_cast<T>(slots.out_of_grid));
    for (Index j = slots.begin; j < slots.end; ++j)
        for (Index e = 0; e < head.dim; ++e) {
            const T v = head.v[j * head.stride + e];
            out[e] += std::isfinite(v) || head.mask == nullptr || head.mask[j] ? v : T(0);
        }
    for (Index e = 0; e < head.dim; ++e) out[e] /= static_cast<T>(3 * window);
}

/// The vector-Jacobian product of window_mean. Adds to d_v, the gradient of value j, what comes from the tokens of
/// [first, last) that saw no key. Rows of d_out are `stride` apart; row i, and entry i of log_sum_exp, are those of
/// token first + i.
template <typename T>
void add_window_mean_gradient(const LocalHead<T>& head, Index window, Index j, Index first, Index last, const T* d_out,
                              Index stride, const T* log_sum_exp, T* d_v) {
    const WindowSlots slots(j, window, head.length);
    for (Index i = std::max(first, slots.begin) - first; i < std::min(last, slots.end) - first; ++i)
        if (log_sum_exp[i] == -std::numeric_limits<T>::infinity())
            for (Index e = 0; e < head.dim; ++e) d_v[e] += d_out[i * stride + e] / static_cast<T>(3 * window);
}

/// Forward of a tile of queries. `out` and `log_sum_exp` are those of its first query; rows of `out` are `stride`
/// apart.
template <typename T, typename Bias>
void attend(const LocalAttention& attention, const LocalHead<T>& head, const LocalQueries<T, Bias>& queries, T* out,
            Index stride, T* log_sum_exp) {
    queries.forward(out, log_sum_exp);
    if (attention.attends_to_padding && !attention.causal && head.mask == nullptr)
        for (Index i = 0; i < queries.count; ++i)
            if (const Index keys = LocalAttention::padding_seen(queries.first + i, head.length, attention.reach);
                keys > 0)
                queries.attend_to_zeros(i, static_cast<T>(keys), out + i * stride, log_sum_exp[i]);
    if (attention.masked_rows == MaskedRows::zero) return;
    for (Index i = 0; i < queries.count; ++i)
        if (log_sum_exp[i] == -std::numeric_limits<T>::infinity())
            window_mean(head, attention.reach, queries.first + i, out + i * stride);
}

}  // namespace cpu

template <typename T, typename Bias>
void local_attention_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> out,
                            TokensView<T> log_sum_exp, View<const T, dynamic, dynamic, dynamic, dynamic> q,
                            View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> kv, Mask mask, Index first,
                            const LocalAttention& attention, const Bias& bias) {
    const Index batch = q.extent(0), queries = q.extent(1), heads = q.extent(2), row = heads * q.extent(3);
    constexpr Index tile = cpu::LocalTile<T>::queries;
    const Index segment = cpu::local_segment<T>(attention.reach, queries), limit = first + queries;
    const Index segments = divide_up(queries, segment);
    parallel_for(policy, batch * segments * heads, [&](Index task) {
        const Index b = task / (heads * segments), h = task / segments % heads;
        const Index begin = first + task % segments * segment, end = std::min(limit, begin + segment);
        const cpu::LocalHead<T> head(kv, mask, b, h, attention);
        const cpu::LocalWindow<T> window(head, begin, end);
        const auto bias_of_head = cpu::local_bias(bias, h, head.reach);
        for (Index i = begin; i < end; i += tile) {
            T local_log_sum[std::size_t{tile}];
            T* const log_sum = log_sum_exp ? &log_sum_exp(b, h, i - first) : local_log_sum;
            const cpu::LocalQueries rows(head, window, bias_of_head, i, end, &q(b, i - first, h, 0), row);
            if (i + tile < end)
                cpu::prefetch_rows(&q(b, i + tile - first, h, 0), std::min(tile, end - i - tile), row, head.dim);
            cpu::attend(attention, head, rows, &out(b, i - first, h, 0), row, log_sum);
        }
    });
}

namespace cpu {

/// The gradients of queries, keys and values, as local_attention_vjp says. Where `recomputed` and
/// `recomputed_log_sum_exp` are given, they are out and log_sum_exp, which are written: each tile's forward runs just
/// before its backward, which reuses the exponentials.
template <typename T, typename Bias, typename DTable>
void local_attention_gradients(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic> d_qkv,
                               View<const T, dynamic, dynamic, dynamic, dynamic> d_out,
                               View<const T, dynamic, dynamic, dynamic, dynamic> out, TokensView<const T> log_sum_exp,
                               View<T, dynamic, dynamic, dynamic, dynamic> recomputed,
                               TokensView<T> recomputed_log_sum_exp,
                               View<const T, dynamic, dynamic, dynamic, dynamic> q,
                               View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> kv, Mask mask, Index first,
                               Index carried, const LocalAttention& attention, const Bias& bias,
                               [[maybe_unused]] const DTable& d_table) {
    constexpr bool has_bias = !std::is_same_v<Bias, NoBias>;
    const bool recompute = static_cast<bool>(recomputed);
    const Index batch = q.extent(0), queries = q.extent(1), heads = q.extent(2), dim = q.extent(3);
    constexpr Index tile = LocalTile<T>::queries;
    const Index segment = local_segment<T>(attention.reach, queries), limit = first + queries;
    const Index segments = divide_up(queries, segment);
    // Row j of d_qkv is that of token origin + j.
    const Index origin = attention.window_begin(first);
    const Index row = heads * dim, d_row = 3 * row;
    const auto d_token = [&](Index b, Index j, Index h) { return &d_qkv(b, j - origin, 0, h, 0); };
    const auto is_carried = [&](Index j) { return j < origin + carried; };
    std::conditional_t<has_bias, TokensTensor<T, Cpu>, NoBias> d_bias_of_tasks;
    if constexpr (has_bias) d_bias_of_tasks = {policy, {batch * segments, heads, bias.by_distance.extent(1)}};
    // Each segment sums the gradients of the keys and values in its window, tile by tile, and then writes them to
    // d_qkv. Segments with even numbers (colour 0) go first, then those with odd numbers (colour 1). The windows of one
    // colour are disjoint, so that no sum depends on the order of threads. To a row that holds gradients already, a
    // segment adds: a carried row, or for colour 1 a row in the window of a neighbour. To other rows it assigns.
    for (Index colour = 0; colour < 2; ++colour) {
        const Index of_colour = (segments + 1 - colour) / 2;
        parallel_for(policy, batch * of_colour * heads, [&](Index task) {
            const Index b = task / (heads * of_colour), h = task / of_colour % heads;
            const Index number = 2 * (task % of_colour) + colour, begin = first + number * segment;
            const Index end = std::min(limit, begin + segment);
            const LocalHead<T> head(kv, mask, b, h, attention);
            const LocalWindow<T> window(head, begin, end);
            const auto bias_of_head = local_bias(bias, h, head.reach);
            const auto d_bias = local_bias_gradient(bias_of_head);
            T* const d_k = thread_scratch<T, struct KeyGradients>(window.rows * window.stride);
            T* const d_v = thread_scratch<T, struct ValueGradients>(window.rows * window.stride);
            std::fill_n(d_k, window.rows * window.stride, T(0));
            std::fill_n(d_v, window.rows * window.stride, T(0));
            for (Index i = begin; i < end; i += tile) {
                if (i + tile < end) {
                    const Index next = i + tile - first, count = std::min(tile, end - i - tile);
                    prefetch_rows(&q(b, next, h, 0), count, row, dim);
                    prefetch_rows(&d_out(b, next, h, 0), count, row, dim);
                    if (!recompute) prefetch_rows(&out(b, next, h, 0), count, row, dim);
                }
                const LocalQueries rows(head, window, bias_of_head, i, end, &q(b, i - first, h, 0), row);
                if (recompute)
                    attend(attention, head, rows, &recomputed(b, i - first, h, 0), row,
                           &recomputed_log_sum_exp(b, h, i - first));
                rows.backward(recompute, d_token(b, i, h), d_row, d_k, d_v, d_bias, &out(b, i - first, h, 0),
                              &d_out(b, i - first, h, 0), &log_sum_exp(b, h, i - first));
            }
            if constexpr (has_bias)
                d_bias.store_by_distance(d_bias_of_tasks.view()[b * segments + number][h].data(),
                                         bias.by_distance.extent(1) / 2);
            for (Index j = std::max(Index{0}, begin - head.reach); j < window.last; ++j) {
                const bool is_assigned =
                    colour == 1 && (j < begin + head.ahead || (end < limit && j >= end - head.reach));
                const bool add = is_assigned || is_carried(j);
                copy_row(add, d_k + (j - window.first) * window.stride, dim, d_token(b, j, h) + row);
                copy_row(add, d_v + (j - window.first) * window.stride, dim, d_token(b, j, h) + 2 * row);
            }
        });
    }
    if constexpr (has_bias) add_bias_gradient(policy, d_table, d_bias_of_tasks.const_view(), bias.buckets);
    if (queries == 0)  // no segment has written
        for (Index b = 0; b < batch; ++b)
            for (Index j = std::min(carried, d_qkv.extent(1)); j < d_qkv.extent(1); ++j)
                std::fill_n(d_token(b, origin + j, 0) + row, 2 * row, T(0));
    if (attention.masked_rows == MaskedRows::zero) return;
    parallel_for(policy, batch * d_qkv.extent(1) * heads, [&](Index task) {
        const Index b = task / (d_qkv.extent(1) * heads), h = task % heads;
        const Index j = origin + task / heads % d_qkv.extent(1);
        T* const d_k = d_token(b, j, h) + row;
        T* const d_v = d_k + row;
        const bool in_reach = j >= first - attention.reach && j < limit + attention.reach;
        if (!in_reach && !is_carried(j)) {  // in the halo of window_mean, where no segment has written
            std::fill_n(d_k, dim, T(0));
            std::fill_n(d_v, dim, T(0));
        }
        if (!mask) return;
        add_window_mean_gradient(LocalHead<T>(kv, mask, b, h, attention), attention.reach, j, first, limit,
                                 &d_out(b, 0, h, 0), row, &log_sum_exp(b, h, 0), d_v);
    });
}

}  // namespace cpu

template <typename T, typename Bias, typename DTable>
void local_attention_vjp_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic> d_qkv,
                                View<const T, dynamic, dynamic, dynamic, dynamic> d_out,
                                View<const T, dynamic, dynamic, dynamic, dynamic> out, TokensView<const T> log_sum_exp,
                                View<const T, dynamic, dynamic, dynamic, dynamic> q,
                                View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> kv, Mask mask, Index first,
                                Index carried, const LocalAttention& attention, const Bias& bias,
                                const DTable& d_table) {
    cpu::local_attention_gradients<T>(policy, d_qkv, d_out, out, log_sum_exp, {}, {}, q, kv, mask, first, carried,
                                      attention, bias, d_table);
}

}  // namespace colt5
