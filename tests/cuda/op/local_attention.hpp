// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include <colt5/op/local_attention.hpp>
#include <colt5/op/zero.hpp>

#include "../draw.hpp"

/// Cases of op/local_attention.hpp.
namespace cases {

template <typename T, typename P>
Results local_attention_of(const P& policy, Draw<T, P>& draw, Index batch, Index length, Index heads, Index dim_head,
                           Index reach) {
    Recorder record(policy);
    const auto with_mask = draw.optional_mask(batch, length);
    const Mask mask = with_mask.const_view();
    const auto q = draw.values(std::array{batch, length, heads, dim_head});
    const auto kv = draw.values(std::array{batch, length, Index{2}, heads, dim_head});
    const auto d_out = draw.values(q.shape());
    const Index part = draw.size(length / 5 + 1, length);
    // As the reference: without a mask, it attends to padding.
    for (const auto& [name, attention] :
         {std::pair{std::string(), LocalAttention{reach}},
          {" as the reference", {.reach = reach, .masked_rows = MaskedRows::window_mean, .attends_to_padding = true}},
          {" causal", {.reach = reach, .causal = true}}}) {
        const auto saved = local_attention_forward(policy, attention, q, kv, mask);
        record("out" + name, saved.out);
        record("out alone" + name, local_attention(policy, attention, q, kv, mask));
        record("d_qkv" + name, local_attention_vjp(policy, attention, saved, d_out, q, kv, mask));

        // The first sequence in parts: each goes to its own place of out and of d_qkv.
        const auto of_sequence = [&](const auto& t, Index first, Index count) {
            const auto view = t.view();
            auto shape = view.shape();
            const Index token = view.size() / (shape[0] * shape[1]);
            shape[0] = 1;
            shape[1] = count;
            return decltype(view)::unchecked(view.data() + first * token, shape);
        };
        Tensor<T, P, dynamic, dynamic, dynamic, dynamic, dynamic> d_qkv(policy, {1, length, 3, heads, dim_head});
        const auto of_window = [&](Index first, Index count) {
            return View<T, dynamic, dynamic, dynamic, dynamic, dynamic>(d_qkv.data() + first * 3 * heads * dim_head,
                                                                        {1, count, 3, heads, dim_head});
        };
        const auto first_mask = mask ? mask.range(0, 1) : mask;
        for (Index first = 0, end = 0; first < length; first += part) {  // end: of the window before
            const Index count = std::min(part, length - first);
            const Index begin = attention.window_begin(first), window = attention.window(first, count, length);
            const auto some_q = of_sequence(q, first, count);
            const auto keys = of_sequence(kv, 0, length);
            const auto some = local_attention_forward(policy, attention, some_q, keys, first_mask, first);
            record("out from " + std::to_string(first) + name, some.out);
            local_attention_vjp(policy, of_window(begin, window), attention, some, of_sequence(d_out, first, count),
                                some_q, keys, first_mask, first, std::max(Index{0}, end - begin));
            end = begin + window;
        }
        record("d_qkv in parts" + name, d_qkv);

        // A part without queries: the gradients of keys and values are 0.
        const Index middle = length / 2, window = attention.window(middle, 0, length);
        const auto no_q = of_sequence(q, middle, 0);
        const auto all_keys = of_sequence(kv, 0, length);
        Tensor<T, P, dynamic, dynamic, dynamic, dynamic, dynamic> d_none(policy, {1, window, 3, heads, dim_head});
        fill(policy, d_none, 1);
        local_attention_vjp(policy, d_none.view(), attention,
                            local_attention_forward(policy, attention, no_q, all_keys, first_mask, middle),
                            of_sequence(d_out, middle, 0), no_q, all_keys, first_mask, middle, 0);
        const auto numbers = to_host(policy, d_none);
        bool are_zeros = true;
        for (std::size_t i = 0; i < numbers.size(); ++i)
            are_zeros = are_zeros &&
                        (static_cast<Index>(i) / (heads * dim_head) % 3 == 0 || static_cast<double>(numbers[i]) == 0);
        record.holds("no gradients without queries" + name, are_zeros);
    }
    return record.results;
}

template <typename T, typename P>
Results local_attention_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    const Index batch = draw.size(1, 9), heads = draw.size(1, 16), dim_head = draw.dim_head();
    const Index length = draw.length(5000, batch * heads * dim_head), reach = draw.length(200);
    return local_attention_of(policy, draw, batch, length, heads, dim_head, reach);
}

/// So many short heads that each block of a kernel with a sliding window over tiles has several tiles of a head.
template <typename T, typename P>
Results many_heads_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    const Index length = draw.size(257, 450), dim_head = 8 * draw.size(1, 8), reach = draw.size(1, 64);
    return local_attention_of(policy, draw, 9, length, 16, dim_head, reach);
}

/// Heads of 64 and a reach of at most 64, for which 16-bit types have a backward kernel of their own.
template <typename T, typename P>
Results heads_of_64_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    const Index batch = draw.size(1, 3), heads = draw.size(1, 4), length = draw.length(3000, batch * heads * 64);
    const Index reach = draw.size(1, 64);
    return local_attention_of(policy, draw, batch, length, heads, 64, reach);
}

/// A window to both sides, perhaps with padding that queries attend to, or a causal one.
template <typename T, typename P>
LocalAttention kind_of_local_attention(Draw<T, P>& draw, Index reach) {
    const Index kind = draw.size(0, 2);
    return {.reach = reach, .attends_to_padding = kind == 2, .causal = kind == 1};
}

/// With a bias: out and gradients, those of the first sequence in parts, and the same bits on a second run.
template <typename T, typename P>
Results local_bias_of(const P& policy, Draw<T, P>& draw, Index batch, Index length, Index heads, Index dim_head,
                      const LocalAttention& attention, const RelativePositionBuckets& buckets, Index bias_reach) {
    using Sum = accumulate_t<T>;
    Recorder record(policy);
    const auto with_mask = draw.optional_mask(batch, length);
    const Mask mask = with_mask.const_view();
    const auto q = draw.values(std::array{batch, length, heads, dim_head});
    const auto kv = draw.values(std::array{batch, length, Index{2}, heads, dim_head});
    const auto d_out = draw.values(q.shape());
    const auto table = draw.values(std::array{buckets.num_buckets, heads});
    const auto by_distance = relative_position_bias(policy, buckets, table, bias_reach);
    record.in_float("by distance", by_distance);
    const RelativePositionBias<Sum> bias{buckets, by_distance.const_view()};
    const auto zero_table = [&] {
        auto zeros = draw.sums(table.shape());
        set_zero(policy, zeros);
        return zeros;
    };
    auto d_table = zero_table(), d_table_again = zero_table();
    const auto saved = local_attention_forward(policy, attention, q, kv, mask, 0, bias);
    record("out", saved.out);
    const auto d_qkv = local_attention_vjp(policy, attention, saved, d_out, q, kv, mask, bias, d_table.view());
    record("d_qkv", d_qkv);
    record("d_table", d_table, Kind::amplified);
    const auto again = local_attention_vjp(policy, attention, saved, d_out, q, kv, mask, bias, d_table_again.view());
    record.holds("the same bits again", same_bits(policy, d_table, d_table_again) && same_bits(policy, d_qkv, again));

    const auto first_of = [](auto&& t, Index first, Index count) {
        const auto view = t.view();
        auto shape = view.shape();
        const Index token = view.size() / (shape[0] * shape[1]);
        shape[0] = 1;
        shape[1] = count;
        return decltype(view)::unchecked(view.data() + first * token, shape);
    };
    auto d_table_of_parts = zero_table();
    Tensor<T, P, dynamic, dynamic, dynamic, dynamic, dynamic> d_parts(policy, {1, length, 3, heads, dim_head});
    const auto first_mask = mask ? mask.range(0, 1) : mask;
    const auto keys = first_of(kv, 0, length);
    const Index part = draw.size(length / 4 + 1, length);
    for (Index first = 0, end = 0; first < length; first += part) {
        const Index count = std::min(part, length - first);
        const Index begin = attention.window_begin(first), window = attention.window(first, count, length);
        const auto some_q = first_of(q, first, count);
        const auto some = local_attention_forward(policy, attention, some_q, keys, first_mask, first, bias);
        record("out from " + std::to_string(first), some.out);
        local_attention_vjp(policy, first_of(d_parts, begin, window), attention, some, first_of(d_out, first, count),
                            some_q, keys, first_mask, first, std::max(Index{0}, end - begin), bias,
                            d_table_of_parts.view());
        end = begin + window;
    }
    record("d_qkv in parts", d_parts);
    record("d_table in parts", d_table_of_parts, Kind::amplified);
    return record.results;
}

template <typename T, typename P>
Results local_bias_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    const Index batch = draw.size(1, 9), heads = draw.size(1, 16), dim_head = draw.dim_head();
    const Index length = draw.length(5000, batch * heads * dim_head), reach = draw.length(200);
    const RelativePositionBuckets buckets{2 * draw.size(2, 20), draw.size(11, 150)};
    return local_bias_of(policy, draw, batch, length, heads, dim_head, kind_of_local_attention(draw, reach), buckets,
                         reach);
}

/// Several tiles of a head in each block, as in many_heads_case. The bias may go beyond the window.
template <typename T, typename P>
Results local_bias_of_many_heads_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    const Index length = draw.size(257, 450), dim_head = 8 * draw.size(1, 8), reach = draw.size(1, 64);
    const Index bias_reach = draw.size(reach, 150);
    return local_bias_of(policy, draw, 9, length, 16, dim_head, kind_of_local_attention(draw, reach), {}, bias_reach);
}

/// As heads_of_64_case. The bias may end within the window or go beyond it.
template <typename T, typename P>
Results local_bias_of_heads_of_64_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    const Index batch = draw.size(1, 3), heads = draw.size(1, 4), length = draw.length(3000, batch * heads * 64);
    const Index reach = draw.size(1, 64), bias_reach = draw.size(1, 100);
    return local_bias_of(policy, draw, batch, length, heads, 64, kind_of_local_attention(draw, reach), {}, bias_reach);
}

}  // namespace cases
