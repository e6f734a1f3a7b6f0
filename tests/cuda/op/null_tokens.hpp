// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/expr/expr.hpp>
#include <colt5/op/null_key.hpp>
#include <colt5/op/null_query.hpp>

#include "../draw.hpp"

/// Cases of op/null_key.hpp and op/null_query.hpp.
namespace cases {

template <typename T, typename P>
Results null_tokens_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), routes = draw.size(1, 3), per_route = draw.size(1, 16 / routes);
    const Index dim_head = draw.dim_head(), keys = draw.length(3000, batch * routes * per_route * dim_head);
    const auto kv = draw.values(std::array{batch, routes, keys, per_route, Index{2}, dim_head});
    const auto null_kv = draw.values(std::array{Index{2}, routes * per_route, dim_head});
    const auto key_mask = draw.mask(batch * routes, keys);
    const auto scale = draw.sums(std::array{batch, routes, keys});
    const auto out =
        with_null_key(policy, kv, null_kv, KeyMask(key_mask.const_view().reshape(std::array{batch, routes, keys})),
                      scale.const_view());
    record("kv", out.kv);
    auto mask_as_numbers = draw.sums(out.mask.shape());
    assign(policy, mask_as_numbers, cast<accumulate_t<T>>(out.mask));
    record("mask", mask_as_numbers, Kind::exact);
    record.in_float("value_scale", out.value_scale);
    const auto without = with_null_key(policy, kv, null_kv, {}, {});
    record.holds("kv does not depend on the mask", same_bits(policy, out.kv, without.kv));
    const auto d_out = draw.values(out.kv.shape());
    const auto d_out_scale = draw.sums(out.value_scale.shape());
    auto d_null_kv = draw.sums(null_kv.shape());
    const auto d = null_key_vjp(policy, d_null_kv.view(), d_out, d_out_scale.const_view());
    record("d_kv", d.d_kv);
    record.in_float("d_value_scale", d.d_value_scale);
    record("d_null_kv", d_null_kv);

    const Index dim = draw.size(1, 200), length = draw.length(5000, batch * dim), k = draw.length(400);
    const auto mask = draw.optional_mask(batch, length);
    const auto indices = draw.indices(batch, k, length);
    const auto live = draw.mask(batch, k);
    auto some_live_as_numbers = draw.sums(std::array{batch, length});
    assign(policy, some_live_as_numbers,
           cast<accumulate_t<T>>(unrouted_tokens(policy, indices, mask.const_view(), length, live.const_view())));
    record("unrouted, of live picks", some_live_as_numbers, Kind::exact);
    const auto unrouted = unrouted_tokens(policy, indices, mask.const_view(), length);
    auto unrouted_as_numbers = draw.sums(unrouted.shape());
    assign(policy, unrouted_as_numbers, cast<accumulate_t<T>>(unrouted));
    record("unrouted", unrouted_as_numbers, Kind::exact);
    auto tokens = draw.values(std::array{batch, length, dim});
    add_null_query(policy, tokens.view(), draw.values(std::array{dim}), unrouted.const_view());
    record("with null queries", tokens);
    auto d_token = draw.sums(std::array{dim});
    null_query_vjp(policy, d_token.view(), draw.values(tokens.shape()), unrouted.const_view());
    record("d_null_token", d_token);
    return record.results;
}

}  // namespace cases
