// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/op/cross_entropy.hpp>

#include "../draw.hpp"

/// Cases of op/cross_entropy.hpp.
namespace cases {

template <typename T, typename P>
Results cross_entropy_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 5), dim = draw.size(1, 200), classes = draw.size(1, 400);
    const Index length = draw.length(2000, batch * classes);
    const auto x = draw.values(std::array{batch, length, dim});
    const auto weight = draw.values(std::array{classes, dim});
    const auto bias = draw.values(std::array{classes});
    const auto targets = draw.indices(batch, length, classes);
    const auto d_losses = draw.sums(std::array{batch, length});
    auto d_weight = draw.sums(weight.shape());
    auto d_bias = draw.sums(bias.shape());
    const CrossEntropy how{.logits_at_a_time = draw.size(1, 2 * batch * length * classes)};
    record("losses", linear_cross_entropy(policy, x, weight, targets, bias.const_view(), how));
    const auto result = linear_cross_entropy_vjp(policy, d_losses, x, weight, targets, d_weight.view(),
                                                 bias.const_view(), d_bias.view(), how);
    record("losses with gradients", result.losses);
    record("d_x", result.d_x);
    record("d_weight", d_weight);
    record("d_bias", d_bias);
    return record.results;
}

}  // namespace cases
