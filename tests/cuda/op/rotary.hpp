// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <string>

#include <colt5/expr/expr.hpp>
#include <colt5/op/rotary.hpp>

#include "../draw.hpp"

/// Cases of op/rotary.hpp.
namespace cases {

template <typename T, typename P>
Results rotary_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), groups = draw.size(1, 4), heads = draw.size(1, 6);
    const Index dim_head = 2 * draw.dim_head(), rows = draw.length(3000, batch * groups * heads * dim_head);
    const Index rotated = draw.size(1, heads);
    const auto inv_freq = rotary_frequencies(policy, dim_head);
    const auto shape = std::array{batch, rows, groups, heads, dim_head};
    for (const Index length : {Index{100}, Index{1} << 20, Index{1} << 29}) {
        const std::string near = " before " + std::to_string(length);
        const auto indices = draw.indices(batch, rows, length);
        for (const RowPositions& at : {RowPositions{indices.const_view()}, RowPositions{{}, length}}) {
            const std::string which = (at.indices ? " at indices" : " from a token on") + near;
            auto x = draw.values(shape), d = draw.values(shape);
            rotary(policy, x.view(), rotated, inv_freq, at);
            record("rotated" + which, x);
            rotary_vjp(policy, d.view(), rotated, inv_freq, at);
            record("d_x" + which, d);
        }
    }

    const auto from = draw.indices(1, 1, 1000);
    const Index first = to_host(policy, from).front();
    Tensor<TokenIndex, P, dynamic, dynamic> in_order(policy, {batch, rows});
    fill_with(policy, in_order, [&](std::size_t i) { return first + static_cast<Index>(i) % rows; });
    auto x = draw.values(shape);
    auto same = tensor_like(policy, x);
    assign(policy, same, as_expression(x));
    rotary(policy, x.view(), rotated, inv_freq, {in_order.const_view()});
    rotary(policy, same.view(), rotated, inv_freq, {{}, first});
    record.holds("rows in order are rows at their indices", same_bits(policy, x, same));
    return record.results;
}

}  // namespace cases
