// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <string>

#include <colt5/op/causal_key_counts.hpp>
#include <colt5/op/dense_attention.hpp>
#include <colt5/op/gathered_attention.hpp>
#include <colt5/op/zero.hpp>

#include "../draw.hpp"

/// Cases of op/dense_attention.hpp and op/gathered_attention.hpp.
namespace cases {

template <typename T, typename P>
Results dense_attention_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), routes = draw.size(1, 3), per_route = draw.size(1, 16 / routes);
    const Index dim_head = draw.dim_head(), of_token = batch * routes * per_route * dim_head;
    const Index length = draw.length(3000, of_token), keys = draw.length(3000, of_token);
    const auto with_mask = draw.optional_mask(batch * routes, keys);
    const KeyMask mask =
        with_mask.size() > 0 ? KeyMask(with_mask.const_view().reshape(std::array{batch, routes, keys})) : KeyMask{};
    const auto q = draw.values(std::array{batch, length, routes * per_route, dim_head});
    const auto kv = draw.values(std::array{batch, routes, keys, per_route, Index{2}, dim_head});
    const auto d_out = draw.values(std::array{batch, length, routes * per_route, dim_head});
    const auto with_scale = draw.sums(std::array{batch, routes, keys});
    for (const bool scaled : {false, true}) {
        const auto scale = scaled ? with_scale.const_view() : TokensView<const accumulate_t<T>>{};
        const std::string name = scaled ? " with value_scale" : "";
        const auto saved = dense_attention_forward(policy, q, kv, mask, scale);
        record("out" + name, saved.out);
        const auto d = dense_attention_vjp(policy, saved, d_out, q, kv, mask, scale);
        record("d_q" + name, d.d_q);
        record("d_kv" + name, d.d_kv);
        if (scaled) record("d_value_scale", d.d_value_scale, Kind::amplified);
    }
    return record.results;
}

/// Each batch entry attends to rows of one tensor.
template <typename T, typename P>
Results gathered_attention_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 20), heads = draw.size(1, 9), dim_head = draw.dim_head();
    const Index of_token = batch * heads * dim_head;
    const Index length = draw.length(400, of_token), rows = draw.length(3000, of_token),
                keys = draw.length(1500, of_token);
    const auto indices = draw.indices(batch, keys, rows);
    const auto at = indices.const_view().reshape(std::array{batch, Index{1}, keys});
    const auto with_mask = draw.optional_mask(batch, keys);
    const KeyMask mask = with_mask.size() > 0 ? KeyMask(with_mask.const_view().reshape(at.shape())) : KeyMask{};
    const auto q = draw.values(std::array{batch, length, heads, dim_head});
    const auto kv = draw.values(std::array{rows, heads, Index{2}, dim_head});
    const auto d_out = draw.values(q.shape());
    const auto with_scale = draw.sums(at.shape());
    for (const bool scaled : {false, true}) {
        const auto scale = scaled ? with_scale.const_view() : TokensView<const accumulate_t<T>>{};
        const std::string name = scaled ? " with value_scale" : "";
        const auto saved = gathered_attention_forward(policy, q, kv, at, mask, scale);
        record("out" + name, saved.out);
        const auto d = gathered_attention_vjp(policy, saved, d_out, q, kv, at, mask, scale);
        record("d_q" + name, d.d_q);
        record("d_kv" + name, d.d_kv);
        if (scaled) record("d_value_scale", d.d_value_scale, Kind::amplified);
    }
    return record.results;
}

/// With a bias by positions, which queries and keys have, or by their numbers; perhaps with null keys.
template <typename T, typename P>
Results dense_bias_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), routes = draw.size(1, 3), per_route = draw.size(1, 16 / routes);
    const Index dim_head = draw.dim_head(), of_token = batch * routes * per_route * dim_head;
    const Index length = draw.length(3000, of_token), null_keys = draw.size(0, 2);
    const Index keys = draw.length(3000, of_token) + null_keys;
    const RelativePositionBuckets buckets{2 * draw.size(2, 20), draw.size(11, 150)};
    const auto with_mask = draw.mask(batch * routes, keys);
    const auto q = draw.values(std::array{batch, length, routes * per_route, dim_head});
    const auto kv = draw.values(std::array{batch, routes, keys, per_route, Index{2}, dim_head});
    const auto d_out = draw.values(q.shape());
    auto scale = draw.sums(std::array{batch, routes, keys});
    assign(policy, scale, abs(scale));  // as scores: with values of either sign the terms of a bucket's sum cancel
    const auto table = draw.values(std::array{buckets.num_buckets, routes * per_route});
    const Index tokens = draw.length(5000);
    const Index query_routes = routes * per_route % 2 == 0 && setting.seed % 2 == 1 ? 2 : 1;
    const auto of_queries = draw.indices(batch * query_routes, length, tokens);
    const auto of_keys = draw.indices(batch * routes, keys - null_keys, tokens);
    const auto by_distance = relative_position_bias(policy, buckets, table, buckets.max_distance);
    for (const bool given : {false, true}) {  // positions, a mask and scales
        const std::string name = given ? " with positions" : "";
        RoutedPositionBias<accumulate_t<T>> bias{{buckets, by_distance.const_view()}, {}, {}, null_keys};
        KeyMask mask;
        TokensView<const accumulate_t<T>> value_scale;
        if (given) {
            bias.query_positions = of_queries.const_view().reshape(std::array{batch, query_routes, length});
            bias.key_positions = of_keys.const_view().reshape(std::array{batch, routes, keys - null_keys});
            mask = with_mask.const_view().reshape(std::array{batch, routes, keys});
            value_scale = scale.const_view();
        }
        auto d_table = draw.sums(table.shape()), d_table_again = draw.sums(table.shape());
        set_zero(policy, d_table);
        set_zero(policy, d_table_again);
        const auto saved = dense_attention_forward(policy, q, kv, mask, value_scale, bias);
        record("out" + name, saved.out);
        const auto d = dense_attention_vjp(policy, saved, d_out, q, kv, mask, value_scale, bias, d_table.view());
        record("d_q" + name, d.d_q);
        record("d_kv" + name, d.d_kv);
        if (given) record("d_value_scale", d.d_value_scale, Kind::amplified);
        record("d_table" + name, d_table, Kind::amplified);
        dense_attention_vjp(policy, saved, d_out, q, kv, mask, value_scale, bias, d_table_again.view());
        record.holds("the same bits again" + name, same_bits(policy, d_table, d_table_again));
    }
    return record.results;
}

/// A query sees its first keys only. The number of keys that a query of the second half sees, and what keys hold that
/// no query of the first half sees, change no bit of the first half.
template <typename T, typename P>
Results first_keys_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), routes = draw.size(1, 3), per_route = draw.size(1, 16 / routes);
    const Index dim_head = draw.dim_head(), of_token = batch * routes * per_route * dim_head;
    const Index heads = routes * per_route, length = draw.length(3000, of_token), keys = draw.length(3000, of_token);
    const Index groups = draw.chance(0.5) ? 1 : heads, seen_at_most = draw.size(0, keys);
    const RelativePositionBuckets buckets{16, 60};
    const auto q = draw.values(std::array{batch, length, heads, dim_head});
    const auto d_out = draw.values(q.shape());
    const auto kv = draw.values(std::array{batch, routes, keys, per_route, Index{2}, dim_head});
    auto scale = draw.sums(std::array{batch, routes, keys});
    assign(policy, scale, abs(scale));
    const auto with_mask = draw.optional_mask(batch * routes, keys);
    const KeyMask mask =
        with_mask.size() > 0 ? KeyMask(with_mask.const_view().reshape(std::array{batch, routes, keys})) : KeyMask{};
    const auto table = draw.values(std::array{buckets.num_buckets, heads});
    const auto by_distance = relative_position_bias(policy, buckets, table, buckets.max_distance);
    TokensTensor<TokenIndex, P> counts(policy, {batch, groups, length}), fewer(policy, counts.shape());
    // Ascending as for causal attention, or not; the last ones see nothing, as queries that are not live.
    const bool ascending = draw.chance(0.5);
    const auto count_of = [=](Index i, bool same) {
        if (i >= length - length / 8 || (!same && i >= length / 2)) return same ? Index{0} : (i * 11) % (keys + 1);
        return ascending ? seen_at_most * (i + 1) / length : (i * 7919) % (seen_at_most + 1);
    };
    fill_with(policy, counts, [&](std::size_t i) { return count_of(static_cast<Index>(i) % length, true); });
    fill_with(policy, fewer, [&](std::size_t i) { return count_of(static_cast<Index>(i) % length, false); });
    // Other keys from the most on that a query of the first half sees.
    Index first_hidden = 0;
    for (Index i = 0; i < length / 2; ++i) first_hidden = std::max(first_hidden, count_of(i, true));
    auto other_kv = tensor_like(policy, kv);
    const auto kv_on_host = to_host(policy, kv);
    fill_with(policy, other_kv, [&](std::size_t i) {
        const Index key = static_cast<Index>(i) / (per_route * 2 * dim_head) % keys;
        return key < first_hidden ? static_cast<double>(kv_on_host[i]) : 3;
    });
    const auto record_with = [&](const std::string& name, auto bias, const auto& d_table) {
        bias.counts = counts.const_view();
        const auto saved = dense_attention_forward(policy, q, kv, mask, scale.const_view(), bias);
        record("out" + name, saved.out);
        const auto d = dense_attention_vjp(policy, saved, d_out, q, kv, mask, scale.const_view(), bias, d_table);
        record("d_q" + name, d.d_q);
        record("d_kv" + name, d.d_kv);
        record("d_value_scale" + name, d.d_value_scale, Kind::amplified);
        bias.counts = fewer.const_view();
        const auto other = dense_attention_forward(policy, q, other_kv, mask, scale.const_view(), bias);
        bool same = true;
        for (Index b = 0; b < batch; ++b) {
            const auto first = to_host(policy, saved.out.const_view()[b]),
                       second = to_host(policy, other.out.const_view()[b]);
            for (std::size_t i = 0; i < static_cast<std::size_t>(length / 2 * heads * dim_head); ++i)
                same = same && static_cast<double>(first[i]) == static_cast<double>(second[i]);
        }
        record.holds("hidden keys change no bit" + name, same);
    };
    record_with("", FirstKeys<>{}, NoBias());
    auto d_table = draw.sums(table.shape());
    set_zero(policy, d_table);
    using Bias = RoutedPositionBias<accumulate_t<T>>;
    record_with(" with a bias", FirstKeys<Bias>{Bias{{buckets, by_distance.const_view()}, {}, {}, 0}, {}},
                d_table.view());
    record("d_table", d_table, Kind::amplified);

    // Positions in the order of the sequence, of which the first are live.
    const Index query_routes = draw.size(1, 3), picks = draw.size(1, 300), chosen = draw.size(0, picks);
    TokensTensor<TokenIndex, P> positions(policy, {batch, routes, picks}),
        of_queries(policy, {batch, query_routes, 77});
    TokensTensor<bool, P> live(policy, positions.shape()), live_queries(policy, of_queries.shape());
    fill_with(policy, positions, [&](std::size_t i) { return static_cast<Index>(i) % picks * 3 + 1; });
    fill_with(policy, live, [&](std::size_t i) { return static_cast<Index>(i) % picks < chosen; });
    fill_with(policy, of_queries, [&](std::size_t i) { return static_cast<Index>(i) * 37 % 1000; });
    fill_with(policy, live_queries, [&](std::size_t i) { return i % 5 != 2; });
    record("causal_key_counts", causal_key_counts(policy, {of_queries.const_view(), live_queries.const_view()},
                                                  {positions.const_view(), live.const_view()}, draw.size(0, 1)));
    record("causal_key_counts, all live",
           causal_key_counts(policy, {of_queries.const_view(), {}}, {positions.const_view(), {}}));
    return record.results;
}

}  // namespace cases
