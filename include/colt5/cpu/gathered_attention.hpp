// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>

#include <colt5/cpu/dense_attention.hpp>
#include <colt5/cpu/gather.hpp>
#include <colt5/op/gathered_attention.hpp>

namespace colt5 {

namespace cpu {

/// Calls run(first, count, kv) for all entries of a batch of indices (b, 1, k), a few at a time: kv (count, 1, k, h, 2,
/// dim_head) has their keys and values, in about twice the memory of x (N, h, 2, dim_head) or less, unless it is one
/// entry.
template <typename T, typename Run>
void for_gathered_keys(const Cpu& policy, View<const T, dynamic, dynamic, dynamic, dynamic> x,
                       TokensView<const TokenIndex> indices, const Run& run) {
    const Index batch = indices.extent(0), keys = indices.extent(2), heads = x.extent(1), dim = x.extent(3);
    const Index at_once = std::clamp(2 * x.extent(0) / std::max(keys, Index{1}), Index{1}, std::max(batch, Index{1}));
    check_indices(indices, x.extent(0));
    const std::array rows{Index{1}, x.extent(0), heads * 2 * dim};
    for (Index first = 0; first < batch; first += at_once) {
        const Index count = std::min(at_once, batch - first);
        Tensor<T, Cpu, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv(policy,
                                                                                {count, 1, keys, heads, 2, dim});
        gather_kernel(policy, kv.view().reshape(std::array{Index{1}, count * keys, rows[2]}), x.reshape(rows),
                      indices.range(first, count).reshape(std::array{Index{1}, count * keys}));
        run(first, count, kv.const_view());
    }
}

/// The entries [first, first + count) of a batch; an absent view stays absent.
template <typename V>
V part_of_batch(const V& all, Index first, Index count) {
    auto shape = all.shape();
    if (all.data() == nullptr && shape[0] == 0) return all;
    shape[0] = count;
    return V::unchecked(all.data() + first * (all.size() / std::max(all.extent(0), Index{1})), shape);
}

}  // namespace cpu

template <typename T>
void gathered_attention_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> out,
                               TokensView<T> log_sum_exp, View<const T, dynamic, dynamic, dynamic, dynamic> q,
                               View<const T, dynamic, dynamic, dynamic, dynamic> kv,
                               TokensView<const TokenIndex> indices, KeyMask mask, TokensView<const T> value_scale) {
    cpu::for_gathered_keys(policy, kv, indices, [&](Index first, Index count, const auto& keys) {
        const auto part = [&](const auto& of) { return cpu::part_of_batch(of, first, count); };
        dense_attention_kernel(policy, part(out), part(log_sum_exp), part(q), keys, part(mask), part(value_scale),
                               NoBias());
    });
}

template <typename T>
void gathered_attention_vjp_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> d_q,
                                   View<T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_kv,
                                   TokensView<T> d_value_scale, View<const T, dynamic, dynamic, dynamic, dynamic> d_out,
                                   View<const T, dynamic, dynamic, dynamic, dynamic> out,
                                   TokensView<const T> log_sum_exp, View<const T, dynamic, dynamic, dynamic, dynamic> q,
                                   View<const T, dynamic, dynamic, dynamic, dynamic> kv,
                                   TokensView<const TokenIndex> indices, KeyMask mask,
                                   TokensView<const T> value_scale) {
    cpu::for_gathered_keys(policy, kv, indices, [&](Index first, Index count, const auto& keys) {
        const auto part = [&](const auto& of) { return cpu::part_of_batch(of, first, count); };
        dense_attention_vjp_kernel(policy, part(d_q), part(d_kv), part(d_value_scale), part(d_out), part(out),
                                   part(log_sum_exp), part(q), keys, part(mask), part(value_scale), NoBias(), NoBias());
    });
}

}  // namespace colt5
