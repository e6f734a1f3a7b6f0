// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>

#include <colt5/cpu/attention_tile.hpp>
#include <colt5/cpu/linear.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/op/dense_attention.hpp>

namespace colt5 {

namespace cpu {

/// One head: queries (n, h, dim_head) of one sequence, keys and values (k, h / r, 2, dim_head) of the head's route.
template <typename T>
struct DenseHead {
    DenseHead(View<const T, dynamic, dynamic, dynamic, dynamic> q,
              View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv, KeyMask mask,
              TokensView<const T> value_scale, Index b, Index h)
        : heads(q.extent(2)),
          per_route(kv.extent(3)),
          dim_head(q.extent(3)),
          route(h / per_route),
          q_offset((b * q.extent(1) * heads + h) * dim_head),
          kv_offset(((b * kv.extent(1) + route) * kv.extent(2) * per_route + h % per_route) * 2 * dim_head),
          head{q.data() + q_offset,
               kv.data() + kv_offset,
               kv.data() + kv_offset + dim_head,
               heads * dim_head,
               per_route * 2 * dim_head,
               dim_head,
               kv.extent(2),
               -1,
               mask ? mask[b][route].data() : nullptr,
               value_scale ? value_scale[b][route].data() : nullptr,
               T(1) / std::sqrt(static_cast<T>(dim_head))} {}
    Index heads, per_route, dim_head, route, q_offset, kv_offset;
    AttentionHead<T> head;
};

}  // namespace cpu

template <typename T>
void dense_attention_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> out,
                            TokensView<T> log_sum_exp, View<const T, dynamic, dynamic, dynamic, dynamic> q,
                            View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv, KeyMask mask,
                            TokensView<const T> value_scale) {
    const Index batch = q.extent(0), length = q.extent(1), heads = q.extent(2), dim = q.extent(3);
    const Index tiles = cpu::divide_up(length, cpu::query_tile);
    parallel_for(policy, batch * heads * tiles, [&](Index task) {
        const Index b = task / (heads * tiles), h = task / tiles % heads, first = task % tiles * cpu::query_tile;
        const cpu::DenseHead<T> dense(q, kv, mask, value_scale, b, h);
        cpu::AttentionTile<T>(dense.head, first, std::min(cpu::query_tile, length - first))
            .forward(&out(b, first, h, 0), heads * dim, &log_sum_exp(b, h, first));
    });
}

template <typename T>
void dense_attention_vjp_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> d_q,
                                View<T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_kv,
                                TokensView<T> d_value_scale, View<const T, dynamic, dynamic, dynamic, dynamic> d_out,
                                View<const T, dynamic, dynamic, dynamic, dynamic> out, TokensView<const T> log_sum_exp,
                                View<const T, dynamic, dynamic, dynamic, dynamic> q,
                                View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv, KeyMask mask,
                                TokensView<const T> value_scale) {
    const Index batch = q.extent(0), length = q.extent(1), heads = q.extent(2), dim = q.extent(3);
    const Index keys = kv.extent(2), per_route = kv.extent(3);
    std::fill_n(d_kv.data(), d_kv.size(), T(0));
    Tensor<T, Cpu, dynamic, dynamic, dynamic> d_scale_of_head(policy, {batch, heads, value_scale ? keys : 0});
    parallel_for(policy, batch * heads, [&](Index task) {
        const Index b = task / heads, h = task % heads;
        const cpu::DenseHead<T> dense(q, kv, mask, value_scale, b, h);
        const cpu::AttentionHeadGradients<T> d{d_q.data() + dense.q_offset, d_kv.data() + dense.kv_offset,
                                               d_kv.data() + dense.kv_offset + dim};
        for (Index first = 0; first < length; first += cpu::query_tile)
            cpu::AttentionTile<T>(dense.head, first, std::min(cpu::query_tile, length - first))
                .backward(d, &out(b, first, h, 0), &d_out(b, first, h, 0), heads * dim, &log_sum_exp(b, h, first));
        if (!value_scale) return;
        for (Index j = 0; j < keys; ++j) {
            T* const d_v = d.d_v + j * dense.head.kv_stride;
            d_scale_of_head.view()(b, h, j) = cpu::dot(d_v, dense.head.v + j * dense.head.kv_stride, dim);
            cpu::scale_row(d_v, dim, dense.head.value_scale[j]);
        }
    });
    if (!value_scale) return;
    std::fill_n(d_value_scale.data(), d_value_scale.size(), T(0));
    for (Index b = 0; b < batch; ++b)
        for (Index h = 0; h < heads; ++h)
            for (Index j = 0; j < keys; ++j)
                d_value_scale(b, h / per_route, j) += d_scale_of_head.const_view()(b, h, j);
}

}  // namespace colt5
