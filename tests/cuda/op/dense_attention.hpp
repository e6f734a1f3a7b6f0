// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <string>

#include <colt5/op/dense_attention.hpp>

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

}  // namespace cases
