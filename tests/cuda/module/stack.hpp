// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <string>

#include <colt5/module/conditional_routed_transformer_block.hpp>
#include <colt5/module/stack.hpp>

#include "../draw.hpp"

/// Cases of module/stack.hpp.
namespace cases {

inline constexpr TransformerBlockConfig stacked_config{.dim = 32,
                                                       .num_heavy_attn_tokens_q = 20,
                                                       .num_heavy_attn_tokens_kv = 30,
                                                       .num_heavy_ff_tokens = 25,
                                                       .light_dim_head = 16,
                                                       .light_heads = 2,
                                                       .light_window_size = 16,
                                                       .heavy_dim_head = 16,
                                                       .heavy_heads = 2,
                                                       .router_type = RouterType::sinkhorn,
                                                       .dropout = 0.2};

/// With checkpoints, no bit is another one. What a layer computes is for the cases of blocks.
template <typename T, typename P>
Results stack_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    using Blocks = Stack<ConditionalRoutedTransformerBlock<stacked_config, T, P>, 3>;
    const Blocks kept(policy, Seed{setting.seed});
    Blocks checkpointed(policy, Seed{setting.seed});
    checkpointed.checkpoints = Checkpoints::layers;
    const Index batch = draw.size(1, 4), length = draw.length(500);
    const auto x = draw.tokens(std::array{batch, length, stacked_config.dim}), d_out = draw.values(x.shape());
    const auto mask = draw.optional_mask(batch, length);
    auto gradients = kept.make_gradients(), again = kept.make_gradients();
    const auto same = [&](const auto& a, const auto& b) { return same_bits(policy, a, b); };
    auto saved = kept.forward(x, mask.const_view());
    auto sparse = checkpointed.forward(x, mask.const_view());
    record.holds("the same output", same(saved.out, sparse.out));
    const auto d_x = kept.backward(std::move(saved), d_out, gradients);
    record.holds("the same gradient", same(d_x, checkpointed.backward(std::move(sparse), d_out, again)));
    bool parameters = true;
    Blocks::each_parameter(
        [&](const std::string&, const auto& a, const auto& b) { parameters = parameters && same(a, b); }, "", gradients,
        again);
    record.holds("the same gradients of parameters", parameters);
    return record.results;
}

}  // namespace cases
