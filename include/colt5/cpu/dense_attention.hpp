// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>

#include <colt5/cpu/attention_tile.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/relative_position_bias.hpp>
#include <colt5/op/dense_attention.hpp>

namespace colt5 {

namespace cpu {

/// data + offset; null without data, in an empty tensor.
template <typename T>
T* at_offset(T* data, Index offset) {
    return data != nullptr ? data + offset : nullptr;
}

/// One head: queries (n, h, dim_head) of one sequence, keys and values (k, h / r, 2, dim_head) of the head's route.
template <typename T>
struct DenseHead {
    template <typename Bias>
    DenseHead(View<const T, dynamic, dynamic, dynamic, dynamic> q,
              View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv, KeyMask mask,
              TokensView<const T> value_scale, const Bias& bias, Index b, Index h)
        : heads(q.extent(2)),
          per_route(kv.extent(3)),
          dim_head(q.extent(3)),
          route(h / per_route),
          q_offset((b * q.extent(1) * heads + h) * dim_head),
          kv_offset(((b * kv.extent(1) + route) * kv.extent(2) * per_route + h % per_route) * 2 * dim_head),
          head{at_offset(q.data(), q_offset),
               at_offset(kv.data(), kv_offset),
               at_offset(kv.data(), kv_offset + dim_head),
               heads * dim_head,
               per_route * 2 * dim_head,
               dim_head,
               kv.extent(2),
               mask ? mask[b][route].data() : nullptr,
               value_scale ? value_scale[b][route].data() : nullptr,
               T(1) / std::sqrt(static_cast<T>(dim_head))} {
        if constexpr (!std::is_base_of_v<NoBias, Bias>) {
            const Index distances = bias.by_distance.extent(1);
            T* const of_entry = thread_scratch<T, struct BiasOfEntry>(distances + 1);
            std::copy_n(bias.by_distance[h].data(), distances, of_entry);
            of_entry[distances] = T(0);
            head.bias = {of_entry, distances / 2, bias.null_keys,
                         bias.query_positions
                             ? bias.query_positions[b][h * bias.query_positions.extent(1) / heads].data()
                             : nullptr,
                         bias.key_positions ? bias.key_positions[b][route].data() : nullptr};
        }
        if constexpr (requires { bias.counts; })
            if (bias.counts) head.key_counts = bias.counts[b][h * bias.counts.extent(1) / heads].data();
    }
    Index heads, per_route, dim_head, route, q_offset, kv_offset;
    AttentionHead<T> head;
};

/// The same head where something is not finite, which then reaches what sees it and nothing else: rows with such
/// entries, those of a key, its value and its value's scale together, become zeros that are marked, in copies.
template <typename T>
class MarkedHead {
public:
    explicit MarkedHead(const AttentionHead<T>& of) : head(of) {
        bool* const marks = mark<struct KeyMarks>(of.keys, {of.k, of.v}, of.kv_stride);
        if (of.value_scale) {
            T* const scales = thread_scratch<T, struct ValueScales>(of.keys);
            for (Index j = 0; j < of.keys; ++j) {
                marks[j] = marks[j] || !std::isfinite(of.value_scale[j]);
                scales[j] = marks[j] ? T(0) : of.value_scale[j];
            }
            head.value_scale = scales;
        }
        head.nonfinite_keys = marks;
        head.kv_stride = of.dim_head;
        head.k = finite_rows<struct Keys>(marks, of.keys, of.k, of.kv_stride);
        head.v = finite_rows<struct Values>(marks, of.keys, of.v, of.kv_stride);
    }
    /// With the gradient of the output, whose rows are as far apart as the queries.
    MarkedHead(const AttentionHead<T>& of, Index queries, const T*& d_out) : MarkedHead(of) {
        bool* const marks = mark<struct QueryMarks>(queries, {of.q, d_out}, of.q_stride);
        head.nonfinite_queries = marks;
        head.q_stride = of.dim_head;
        head.q = finite_rows<struct Queries>(marks, queries, of.q, of.q_stride);
        d_out = finite_rows<struct OutGradients>(marks, queries, d_out, of.q_stride);
    }
    AttentionHead<T> head;

private:
    template <typename Use>
    bool* mark(Index rows, std::array<const T*, 2> of, Index stride) const {
        bool* const marks = thread_scratch<bool, Use>(rows);
        for (Index i = 0; i < rows; ++i)
            marks[i] = !all_finite(of[0] + i * stride, head.dim_head) || !all_finite(of[1] + i * stride, head.dim_head);
        return marks;
    }
    template <typename Use>
    const T* finite_rows(const bool* marks, Index rows, const T* from, Index stride) const {
        T* const to = thread_scratch<T, Use>(rows * head.dim_head);
        for (Index i = 0; i < rows; ++i)
            if (marks[i])
                std::fill_n(to + i * head.dim_head, head.dim_head, T(0));
            else
                std::copy_n(from + i * stride, head.dim_head, to + i * head.dim_head);
        return to;
    }
};

template <typename T>
bool all_finite(const T* rows, Index count, Index stride, Index dim) {
    Batch<T> found(T(0));
    for (Index i = 0; i < count; ++i)
        for_each_batch<T>(
            dim, [&](Index j, Index width) { found = look_for_nonfinite(load(rows + i * stride + j, width), found); });
    return !found_nonfinite(found);
}

}  // namespace cpu

template <typename T, typename Bias>
void dense_attention_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> out,
                            TokensView<T> log_sum_exp, View<const T, dynamic, dynamic, dynamic, dynamic> q,
                            View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv, KeyMask mask,
                            TokensView<const T> value_scale, const Bias& bias) {
    const Index batch = q.extent(0), length = q.extent(1), heads = q.extent(2), dim = q.extent(3);
    const Index tiles = divide_up(length, cpu::query_tile);
    parallel_for(policy, batch * heads * tiles, [&](Index task) {
        const Index b = task / (heads * tiles), h = task / tiles % heads, first = task % tiles * cpu::query_tile;
        const cpu::DenseHead<T> dense(q, kv, mask, value_scale, bias, b, h);
        const Index rows = std::min(cpu::query_tile, length - first);
        const auto run = [&](const cpu::AttentionHead<T>& head) {
            cpu::AttentionTile<T>(head, first, rows)
                .forward(&out(b, first, h, 0), heads * dim, &log_sum_exp(b, h, first));
        };
        run(dense.head);
        if (!cpu::all_finite(&out(b, first, h, 0), rows, heads * dim, dim)) run(cpu::MarkedHead<T>(dense.head).head);
    });
}

template <typename T, typename Bias, typename DTable>
void dense_attention_vjp_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> d_q,
                                View<T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_kv,
                                TokensView<T> d_value_scale, View<const T, dynamic, dynamic, dynamic, dynamic> d_out,
                                View<const T, dynamic, dynamic, dynamic, dynamic> out, TokensView<const T> log_sum_exp,
                                View<const T, dynamic, dynamic, dynamic, dynamic> q,
                                View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv, KeyMask mask,
                                TokensView<const T> value_scale, const Bias& bias,
                                [[maybe_unused]] const DTable& d_table) {
    constexpr bool has_bias = !std::is_base_of_v<NoBias, Bias>;
    const Index batch = q.extent(0), length = q.extent(1), heads = q.extent(2), dim = q.extent(3);
    const Index keys = kv.extent(2), per_route = kv.extent(3);
    Tensor<T, Cpu, dynamic, dynamic, dynamic> d_scale_of_head(policy, {batch, heads, value_scale ? keys : 0});
    std::conditional_t<has_bias, TokensTensor<T, Cpu>, NoBias> d_by_distance;
    if constexpr (has_bias) d_by_distance = {policy, {batch, heads, bias.by_distance.extent(1)}};
    parallel_for(policy, batch * heads, [&](Index task) {
        const Index b = task / heads, h = task % heads;
        const cpu::DenseHead<T> dense(q, kv, mask, value_scale, bias, b, h);
        const Index q_stride = dense.head.q_stride, kv_stride = dense.head.kv_stride;
        cpu::AttentionHeadGradients<T> d{cpu::at_offset(d_q.data(), dense.q_offset),
                                         cpu::at_offset(d_kv.data(), dense.kv_offset),
                                         cpu::at_offset(d_kv.data(), dense.kv_offset + dim), q_stride, kv_stride};
        const Index bias_entries = dense.head.bias.entries();
        if constexpr (has_bias) d.d_bias = cpu::thread_scratch<T, struct BiasSums>(cpu::bias_copies * bias_entries);
        T* const d_scale = d_scale_of_head.data() + task * (value_scale ? keys : 0);
        // Returns whether all is finite.
        const auto run = [&](const cpu::AttentionHead<T>& head, const T* d_out_rows, Index d_out_stride) {
            for (Index j = 0; j < keys; ++j) std::fill_n(d.d_k + j * kv_stride, 2 * dim, T(0));
            if constexpr (has_bias) std::fill_n(d.d_bias, cpu::bias_copies * bias_entries, T(0));
            for (Index first = 0; first < length; first += cpu::query_tile)
                cpu::AttentionTile<T>(head, first, std::min(cpu::query_tile, length - first))
                    .backward(d, &out(b, first, h, 0), q_stride, d_out_rows + first * d_out_stride, d_out_stride,
                              &log_sum_exp(b, h, first));
            for (Index j = 0; j < keys && value_scale; ++j)
                d_scale[j] = cpu::dot(d.d_v + j * kv_stride, head.v + j * head.kv_stride, dim);
            return cpu::all_finite(d.d_q, length, q_stride, dim) && cpu::all_finite(d.d_k, keys, kv_stride, 2 * dim) &&
                   (!value_scale || cpu::all_finite(d_scale, keys));
        };
        const T* d_out_rows = cpu::at_offset(d_out.data(), dense.q_offset);
        if (!run(dense.head, d_out_rows, q_stride)) {
            const cpu::MarkedHead<T> marked(dense.head, length, d_out_rows);
            run(marked.head, d_out_rows, dim);
        }
        if constexpr (has_bias)
            for (Index i = 0; i < bias_entries - 1; ++i) {
                T sum = 0;
                for (Index copy = 0; copy < cpu::bias_copies; ++copy) sum += d.d_bias[copy * bias_entries + i];
                d_by_distance.view()(b, h, i) = sum / dense.head.scale;
            }
        for (Index j = 0; j < keys && value_scale; ++j) {
            T *const row = d.d_v + j * kv_stride, scale = dense.head.value_scale[j];
            const auto is_zero = [](T x) { return x == T(0); };  // of all entries: no query sees the key
            if (std::isfinite(scale) || !std::all_of(row, row + dim, is_zero)) cpu::scale_row(row, dim, scale);
        }
    });
    if constexpr (has_bias) cpu::add_bias_gradient(policy, d_table, d_by_distance.const_view(), bias.buckets);
    if (!value_scale) return;
    std::fill_n(d_value_scale.data(), d_value_scale.size(), T(0));
    for (Index b = 0; b < batch; ++b)
        for (Index h = 0; h < heads; ++h)
            for (Index j = 0; j < keys; ++j)
                d_value_scale(b, h / per_route, j) += d_scale_of_head.const_view()(b, h, j);
}

}  // namespace colt5
