// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>

#include <colt5/op/linear.hpp>

#include "../draw.hpp"

/// Cases of op/linear.hpp.
namespace cases {

template <typename T, typename P>
Results linear_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), routes = draw.size(1, 3), in = draw.size(1, 140), out = draw.size(1, 140);
    const Index length = draw.length(5000, batch * routes * std::max(in, out));
    const auto x = draw.values(std::array{batch, routes, length, in});
    const auto weight = draw.values(std::array{routes * out, in});
    const auto bias = draw.values(std::array{routes * out});
    const auto d_y = draw.values(std::array{batch, routes, length, out});
    auto d_weight = draw.sums(std::array{routes * out, in});
    auto d_bias = draw.sums(std::array{routes * out});
    record("y", routed_linear(policy, x, weight, bias.const_view()));
    record("y without bias", routed_linear(policy, x, weight));
    record("d_x", routed_linear_vjp(policy, d_y, x, weight, d_weight.view(), d_bias.view()));
    record("d_weight", d_weight);
    record.in_float("d_bias", d_bias);

    // Without an inner dimension: the bias and what is added. Without outputs: a gradient of 0.
    const auto nothing = draw.values(std::array{batch, length, Index{0}});
    const auto empty_weight = draw.values(std::array{out, Index{0}});
    const auto add = draw.values(std::array{batch, length, out});
    record("y of nothing", linear(policy, nothing, empty_weight, bias.const_view().range(0, out), add.const_view()));
    record.holds("y of nothing without bias is 0", all_zero(policy, linear(policy, nothing, empty_weight)));
    const auto one_x = draw.values(std::array{batch, length, in});
    const auto no_rows = draw.values(std::array{Index{0}, in});
    auto d_no_rows = draw.sums(std::array{Index{0}, in});
    record.holds("d_x without outputs is 0",
                 all_zero(policy, linear_vjp(policy, nothing, one_x, no_rows, d_no_rows.view())));
    return record.results;
}

}  // namespace cases
