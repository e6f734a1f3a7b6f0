// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <colt5/module/conditional_routed_feed_forward.hpp>
#include <colt5/optim/adamw.hpp>
#include <colt5/optim/clip.hpp>

#include "../draw.hpp"

/// Cases of AdamW, of clipping and of the loop around them.
namespace cases {

inline constexpr FeedForwardConfig trained_config{
    .dim = 32, .num_heavy_tokens = 8, .router_kwargs = {.coor_descent = {.score_scale = 0.2}}};

/// Ten steps of AdamW on given gradients. Of 16-bit parameters, the master copy is what is compared.
template <typename T, typename P>
Results optimizer_case(const P& policy, const Setting& setting) {
    using Module = ConditionalRoutedFeedForward<trained_config, T, P>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    Module trained = draw.template made<Module>();
    AdamW optimizer(policy, trained,
                    {.lr = 1e-2, .decays = [](std::string_view name) { return name.size() % 2 == 0; }});
    auto gradients = trained.make_gradients();
    for (int step = 0; step < 10; ++step) {
        draw.template fill_gradients<Module>(gradients);
        clip_gradient_norm<Module>(policy, gradients, 10);
        optimizer.step(trained, gradients);
    }
    Module::each_parameter(
        [&](const std::string& name, const auto& parameter, auto& master) {
            if constexpr (HalfPrecision<T>) {
                record.in_float(name, master);
                auto copy = tensor_like(policy, parameter);
                assign(policy, copy, master);
                record.holds(name + " is its master copy, rounded", same_bits(policy, copy, parameter));
            } else {
                record.in_float(name, parameter);
                record.holds(name + " is its master copy, rounded", true);
            }
        },
        "", trained, optimizer.state().master);
    return record.results;
}

/// Ten steps of AdamW with clipping, and the loss ‖module(x) − target‖² of each.
template <typename T, typename P>
Results training_case(const P& policy, const Setting& setting) {
    using Module = ConditionalRoutedFeedForward<trained_config, T, P>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    Module trained = draw.template made<Module>();
    AdamW optimizer(policy, trained, {.lr = 1e-2});
    const std::array shape{Index{2}, draw.size(1, 100), trained_config.dim};
    const auto x = draw.tokens(shape), target = draw.values(shape);
    auto gradients = trained.make_gradients();
    std::vector<double> losses;
    for (int step = 0; step < 10; ++step) {
        zero_gradients<Module>(policy, gradients);
        const auto saved = trained.forward(x);
        auto difference = tensor_like(policy, x);
        assign(policy, difference, saved.out - target);
        losses.push_back(sum_of_squares(policy, difference));
        trained.backward(saved, difference, gradients);
        clip_gradient_norm<Module>(policy, gradients, 0.5);
        optimizer.step(trained, gradients);
    }
    record.holds("the loss has fallen", losses.back() < 0.95 * losses.front());
    record.results["losses"] = {Kind::amplified, losses};  // rounding may route another token in one of the steps
    return record.results;
}

}  // namespace cases
