// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <string>

#include <colt5/op/dense_attention.hpp>
#include <colt5/op/zero.hpp>

#include "../draw.hpp"

/// Cases of op/dense_attention.hpp.
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

}  // namespace cases
