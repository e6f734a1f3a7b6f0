// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>

#include <colt5/module/conditional_routed_cross_attention.hpp>
#include <colt5/module/conditional_routed_transformer_block.hpp>
#include <colt5/optim/adamw.hpp>
#include <colt5/optim/clip.hpp>

#include "draw.hpp"

/// The bodies of the cases of modules and of training: see bodies.hpp.
namespace cases {

using namespace colt5;

/// Output and all gradients of a module.
template <typename Module, typename T, typename P, typename... Inputs>
void record_module(Recorder<P>& record, Draw<T, P>& draw, const Module& of, const Inputs&... inputs) {
    const auto pass = of.forward(inputs...);
    record("inference", of(inputs...));
    record("out", pass.out);
    auto gradients = of.make_gradients();
    const auto d = of.backward(pass, draw.values(pass.out.shape()), gradients);
    if constexpr (requires { d.d_context; }) {
        record("d_x", d.d_x);
        record("d_context", d.d_context);
    } else {
        record("d_tokens", d);
    }
    Module::each_parameter([&](const std::string& name, auto& gradient) { record("gradient of " + name, gradient); },
                           "", gradients);
}

constexpr TransformerBlockConfig block_config(RouterType router, Index routes = 2) {
    return {.dim = 48,
            .num_heavy_attn_tokens_q = 12,
            .num_heavy_attn_tokens_kv = 20,
            .num_routed_kv = routes,
            .num_heavy_ff_tokens = 17,
            .light_dim_head = 16,
            .light_heads = 3,
            .light_window_size = 30,
            .heavy_dim_head = 32,
            .heavy_heads = 4,
            .router_straight_through = false,
            .router_type = router,
            .router_kwargs = {.coor_descent = {.score_scale = 0.2}, .cum_softmax = {.temperature = 4}}};
}
inline constexpr TransformerBlockConfig by_descent = block_config(RouterType::coor_descent),
                                        by_descent_of_one_route = block_config(RouterType::coor_descent, 1),
                                        by_softmax = block_config(RouterType::cum_softmax),
                                        by_sinkhorn = block_config(RouterType::sinkhorn);

/// Each half of the block on its own: what it routes by is the same number on either side, whatever the precision.
template <TransformerBlockConfig config, typename T, typename P>
Results half_block_case(const P& policy, const Setting& setting) {
    using Block = ConditionalRoutedTransformerBlock<config, T, P>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), length = draw.length(500);
    const auto x = draw.values(std::array{batch, length, config.dim});
    const auto with_mask = draw.mask(batch, length);
    const Mask mask = draw.chance(0.5) ? Mask{} : Mask(with_mask.const_view());
    const Residual residual = draw.chance(0.5) ? Residual::tokens : Residual::none;
    if (setting.seed % 2 == 0)
        record_module(record, draw, draw.template made<typename Block::Attention>(), x, mask, AttentionTokens{},
                      residual);
    else
        record_module(record, draw, draw.template made<typename Block::FeedForward>(), x, mask, FeedForwardTokens{},
                      residual);
    return record.results;
}

/// The block is its two halves, bit for bit. Where numbers are rounded less than in float, this is all that can be said
/// of it: its feedforward routes by what its attention computed, and may choose another token.
template <TransformerBlockConfig config, typename T, typename P>
Results block_case(const P& policy, const Setting& setting) {
    using Block = ConditionalRoutedTransformerBlock<config, T, P>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), length = draw.length(500);
    const auto x = draw.values(std::array{batch, length, config.dim});
    const auto d_out = draw.values(x.shape());
    const auto with_mask = draw.mask(batch, length);
    const Mask mask = draw.chance(0.5) ? Mask{} : Mask(with_mask.const_view());

    const Block block = draw.template made<Block>();
    auto gradients = block.make_gradients();
    const auto pass = block.forward(x, mask);
    const auto d_x = block.backward(pass, d_out, gradients);

    const Block parts = draw.template made<Block>();  // another one, since Sinkhorn draws noise at every call
    auto gradients_of_parts = parts.make_gradients();
    const auto attention = parts.conditional_attn.forward(x, mask, {}, Residual::tokens);
    const auto feed_forward = parts.conditional_ff.forward(attention.out, mask, {}, Residual::tokens);
    const auto d_middle = parts.conditional_ff.backward(feed_forward, d_out, gradients_of_parts.conditional_ff);
    const auto d_x_of_parts = parts.conditional_attn.backward(attention, d_middle, gradients_of_parts.conditional_attn);

    record.holds("out is that of the parts", same_bits(policy, pass.out, feed_forward.out));
    record.holds("d_tokens is that of the parts", same_bits(policy, d_x, d_x_of_parts));
    Block::each_parameter(
        [&](const std::string& name, const auto& a, const auto& b) {
            record.holds("gradient of " + name + " is that of the parts", same_bits(policy, a, b));
        },
        "", gradients, gradients_of_parts);
    if (setting.precision == Precision::fp64 || setting.precision == Precision::fp32)
        record_module(record, draw, draw.template made<Block>(), x, mask);
    return record.results;
}

inline constexpr CrossAttentionConfig cross_config{.dim = 48,
                                                   .num_tokens_q = 20,
                                                   .num_tokens_kv = 30,
                                                   .dim_head = 16,
                                                   .heads = 4,
                                                   .router_kwargs = {.coor_descent = {.score_scale = 0.2}},
                                                   .kv_routing_tokens = 2};

template <typename T, typename P>
Results cross_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 5), length = draw.length(200), memories = draw.length(2000);
    const auto x = draw.values(std::array{batch, length, cross_config.dim});
    const auto context = draw.values(std::array{batch, memories, cross_config.dim});
    const auto with_mask = draw.mask(batch, length);
    const auto with_context_mask = draw.mask(batch, memories);
    const bool masked = draw.chance(0.5);
    record_module(record, draw, draw.template made<ConditionalRoutedCrossAttention<cross_config, T, P>>(), x, context,
                  masked ? Mask(with_mask.const_view()) : Mask{},
                  masked ? Mask(with_context_mask.const_view()) : Mask{});
    return record.results;
}

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

/// Ten steps of AdamW with clipping: the losses on the way, of ‖module(x) − target‖².
template <typename T, typename P>
Results training_case(const P& policy, const Setting& setting) {
    using Module = ConditionalRoutedFeedForward<trained_config, T, P>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    Module trained = draw.template made<Module>();
    AdamW optimizer(policy, trained, {.lr = 1e-2});
    const std::array shape{Index{2}, draw.size(1, 100), trained_config.dim};
    const auto x = draw.values(shape), target = draw.values(shape);
    auto gradients = trained.make_gradients();
    std::vector<double> losses;
    for (int step = 0; step < 10; ++step) {
        zero_gradients<Module>(policy, gradients);
        const auto pass = trained.forward(x);
        auto difference = tensor_like(policy, x);
        assign(policy, difference, pass.out - target);
        losses.push_back(sum_of_squares(policy, difference));
        trained.backward(pass, difference, gradients);
        clip_gradient_norm<Module>(policy, gradients, 0.5);
        optimizer.step(trained, gradients);
    }
    record.holds("the loss has fallen", losses.back() < 0.95 * losses.front());
    record.results["losses"] = {Kind::amplified, losses};  // a token more or less is routed on the way
    return record.results;
}

}  // namespace cases
