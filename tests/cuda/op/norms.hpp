// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/op/layer_norm.hpp>
#include <colt5/op/rms_norm.hpp>

#include "../draw.hpp"

/// Cases of op/rms_norm.hpp and op/layer_norm.hpp.
namespace cases {

template <typename T, typename P>
Results norms_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), dim = draw.size(2, 600);
    const std::array shape{batch, draw.length(5000, batch * dim), dim};
    const auto x = draw.values(shape), d_y = draw.values(shape);
    const auto weight = draw.values(std::array{shape[2]}), bias = draw.values(std::array{shape[2]});
    auto d_weight = draw.sums(std::array{shape[2]}), d_bias = draw.sums(std::array{shape[2]});
    record("rms_norm", rms_norm(policy, x, weight));
    record("d_x of rms_norm", rms_norm_vjp(policy, d_y, x, weight, d_weight.view()));
    record("layer_norm", layer_norm(policy, x, weight, bias));
    record("d_x of layer_norm", layer_norm_vjp(policy, d_y, x, weight, d_weight.view(), d_bias.view()));
    record.in_float("d_weight", d_weight);
    record.in_float("d_bias", d_bias);
    return record.results;
}

}  // namespace cases
