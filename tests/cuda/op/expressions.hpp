// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/expr/expr.hpp>
#include <colt5/op/gelu.hpp>
#include <colt5/op/softmax.hpp>

#include "../draw.hpp"

/// Cases of expressions: op/gelu.hpp, op/softmax.hpp, and rows with masks and norms.
namespace cases {

template <typename T, typename P>
Results expressions_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), dim = draw.size(1, 300);
    const std::array shape{batch, draw.length(5000, batch * dim), dim};
    const auto x = draw.values(shape);
    auto y = draw.values(shape);
    const auto mask = draw.mask(shape[0], shape[1]);
    const auto scores = draw.values(std::array{shape[0], shape[1]});
    record("gelu", gelu_forward(policy, x));
    gelu_vjp(policy, y, x);
    record("gelu_vjp", y);
    auto of_tanh = tensor_like(policy, x);
    assign(policy, of_tanh, gelu_tanh(x));
    record("gelu_tanh", of_tanh);
    assign(policy, of_tanh, gelu_tanh_slope(x));
    record("gelu_tanh_slope", of_tanh);
    record("softmax", softmax(policy, x));
    record("softmax_vjp", softmax_vjp(policy, y, x));
    assign(policy, y,
           select(column(mask), x * column(scores) / max(row_norm(x), accumulate_t<T>(1e-6)), accumulate_t<T>(0)));
    record("rows", y);
    return record.results;
}

}  // namespace cases
