// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <colt5/cpu/attention_tile.hpp>
#include <colt5/cpu/linear.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/op/local_attention.hpp>

namespace colt5 {

namespace cpu {

/// One head of packed queries, keys and values (n, 3, h, dim_head) of one sequence.
template <typename T>
struct LocalHead {
    LocalHead(View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> qkv, Mask mask, Index b, Index h, Index reach)
        : length(qkv.extent(1)),
          heads(qkv.extent(3)),
          dim_head(qkv.extent(4)),
          offset((b * length * 3 * heads + h) * dim_head),
          stride(3 * heads * dim_head),
          head{qkv.data() + offset,
               qkv.data() + offset + heads * dim_head,
               qkv.data() + offset + 2 * heads * dim_head,
               stride,
               stride,
               dim_head,
               length,
               reach,
               mask ? mask[b].data() : nullptr,
               nullptr,
               T(1) / std::sqrt(static_cast<T>(dim_head))} {}
    Index length, heads, dim_head, offset, stride;
    AttentionHead<T> head;
};

/// The tokens [begin, end) of the three windows around token i; `out_of_grid` counts the slots of whole windows beyond
/// the sequence, whose values the reference sets to −1.
struct WindowSlots {
    WindowSlots(Index i, Index window, Index length) {
        const Index first = (i / window - 1) * window, last = (i / window + 2) * window;
        const Index grid = divide_up(length, window) * window;
        begin = std::max(Index{0}, first);
        end = std::min(length, last);
        out_of_grid = std::max(Index{0}, -first) + std::max(Index{0}, last - grid);
    }
    Index begin, end, out_of_grid;
};

}  // namespace cpu

template <typename T>
void local_attention_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> out,
                            TokensView<T> log_sum_exp, View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> qkv,
                            Mask mask, const LocalAttention& attention) {
    const Index batch = qkv.extent(0), length = qkv.extent(1), heads = qkv.extent(3), dim = qkv.extent(4);
    const Index tiles = cpu::divide_up(length, cpu::query_tile);
    parallel_for(policy, batch * tiles * heads, [&](Index task) {
        const Index b = task / (tiles * heads), first = task / heads % tiles * cpu::query_tile, h = task % heads;
        const Index count = std::min(cpu::query_tile, length - first);
        const cpu::LocalHead<T> local(qkv, mask, b, h, attention.reach);
        T kept[cpu::query_tile];
        T* const log_sum = log_sum_exp ? &log_sum_exp(b, h, first) : kept;
        cpu::AttentionTile<T>(local.head, first, count).forward(&out(b, first, h, 0), heads * dim, log_sum);
        if (attention.masked_rows == MaskedRows::zero) return;
        for (Index i = first; i < first + count; ++i) {
            if (log_sum[i - first] != -std::numeric_limits<T>::infinity()) continue;
            const cpu::WindowSlots slots(i, attention.reach, length);
            T* const row = &out(b, i, h, 0);
            for (Index e = 0; e < dim; ++e) row[e] = -static_cast<T>(slots.out_of_grid);
            for (Index j = slots.begin; j < slots.end; ++j)
                for (Index e = 0; e < dim; ++e) row[e] += local.head.v[j * local.stride + e];
            for (Index e = 0; e < dim; ++e) row[e] /= static_cast<T>(3 * attention.reach);
        }
    });
}

template <typename T>
void local_attention_vjp_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic> d_qkv,
                                View<const T, dynamic, dynamic, dynamic, dynamic> d_out,
                                View<const T, dynamic, dynamic, dynamic, dynamic> out, TokensView<const T> log_sum_exp,
                                View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> qkv, Mask mask,
                                const LocalAttention& attention) {
    const Index batch = qkv.extent(0), length = qkv.extent(1), heads = qkv.extent(3), dim = qkv.extent(4);
    std::fill_n(d_qkv.data(), d_qkv.size(), T(0));
    // Each segment marches along its queries and adds to the keys and values around them. Segments of one colour are
    // far enough apart not to meet, so that no sum depends on the order of threads.
    const Index segment = cpu::divide_up(std::max(Index{1024}, 4 * attention.reach), cpu::query_tile) * cpu::query_tile;
    const Index segments = cpu::divide_up(length, segment);
    for (Index colour = 0; colour < 2; ++colour) {
        const Index of_colour = (segments + 1 - colour) / 2;
        parallel_for(policy, batch * of_colour * heads, [&](Index task) {
            const Index b = task / (of_colour * heads), h = task % heads;
            const Index begin = (2 * (task / heads % of_colour) + colour) * segment;
            const cpu::LocalHead<T> local(qkv, mask, b, h, attention.reach);
            T* const d_q = d_qkv.data() + local.offset;
            const cpu::AttentionHeadGradients<T> d{d_q, d_q + heads * dim, d_q + 2 * heads * dim};
            for (Index first = begin; first < std::min(length, begin + segment); first += cpu::query_tile) {
                const Index count = std::min(cpu::query_tile, length - first);
                cpu::AttentionTile<T>(local.head, first, count)
                    .backward(d, &out(b, first, h, 0), &d_out(b, first, h, 0), heads * dim, &log_sum_exp(b, h, first));
                if (attention.masked_rows == MaskedRows::zero) continue;
                for (Index i = first; i < first + count; ++i) {
                    if (log_sum_exp(b, h, i) != -std::numeric_limits<T>::infinity()) continue;
                    const cpu::WindowSlots slots(i, attention.reach, length);
                    for (Index j = slots.begin; j < slots.end; ++j)
                        for (Index e = 0; e < dim; ++e)
                            d.d_v[j * local.stride + e] += d_out(b, i, h, e) / static_cast<T>(3 * attention.reach);
                }
            }
        });
    }
}

}  // namespace colt5
