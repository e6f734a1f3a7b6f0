// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>

#include <colt5/op/feed_forward.hpp>

#include "../draw.hpp"

/// Cases of op/feed_forward.hpp.
namespace cases {

/// Every other one of the widths that one kernel of compute capability 9.0a takes in 16 bits.
template <typename T, typename P>
Results feed_forward_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    using Sum = accumulate_t<T>;
    const bool wide = setting.seed % 2 == 0;
    const Index dim = wide ? 512 : draw.size(1, 140), hidden = wide ? 256 : draw.size(1, 140);
    const Index batch = draw.size(1, 4);
    const std::array shape{batch, draw.length(5000, batch * dim / 4), dim};
    const auto x = draw.values(shape), d_y = draw.values(shape), add = draw.values(shape);
    const auto gamma = draw.values(std::array{dim}), hidden_bias = draw.values(std::array{hidden}, 0.3);
    const auto bias = draw.values(std::array{dim}, 0.3);
    const auto hidden_weight = draw.values(std::array{hidden, dim}, 1 / std::sqrt(double(dim)));
    const auto weight = draw.values(std::array{dim, hidden}, 1 / std::sqrt(double(hidden)));
    const FeedForwardParameters<const T> parameters{{gamma.const_view()},
                                                    hidden_weight.const_view(),
                                                    hidden_bias.const_view(),
                                                    weight.const_view(),
                                                    bias.const_view()};
    TokensTensor<T, P> pre_activation(policy, {shape[0], shape[1], hidden});
    const auto y = feed_forward(policy, x, parameters);
    record("y", y);
    const auto same = feed_forward(policy, x, parameters, pre_activation.view());
    record.holds("y is the same where `pre_activation` is saved", same_bits(policy, same, y));
    record("pre_activation", pre_activation);
    record("y with something added", feed_forward(policy, x, parameters, {}, add.const_view()));
    auto d_gamma = draw.sums(std::array{dim}), d_hidden_bias = draw.sums(std::array{hidden});
    auto d_bias = draw.sums(std::array{dim});
    auto d_hidden_weight = draw.sums(std::array{hidden, dim}), d_weight = draw.sums(std::array{dim, hidden});
    const FeedForwardParameters<Sum> gradients{
        {d_gamma.view()}, d_hidden_weight.view(), d_hidden_bias.view(), d_weight.view(), d_bias.view()};
    auto d_x = tensor_like(policy, x);
    feed_forward_vjp(policy, d_x.view(), d_y, x, pre_activation.const_view(), parameters, gradients);
    record("d_x", d_x);
    record("d_gamma", d_gamma);
    record("d_hidden_weight", d_hidden_weight);
    record("d_hidden_bias", d_hidden_bias);
    record("d_weight", d_weight);
    record.in_float("d_bias", d_bias);
    return record.results;
}

}  // namespace cases
