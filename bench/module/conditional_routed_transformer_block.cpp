// SPDX-License-Identifier: MIT
// The block of the reference's README. Numbers: its width, or 128 for a small one; the steps of the descent, 50 or 20;
// how many tokens each router chooses, if not as many as configured.
#include "../measure.hpp"

namespace {

constexpr colt5::TransformerBlockConfig flagship{.dim = 512,
                                                 .num_heavy_attn_tokens_q = 1024,
                                                 .num_heavy_attn_tokens_kv = 1024,
                                                 .num_heavy_ff_tokens = 1024,
                                                 .light_dim_head = 64,
                                                 .light_heads = 8,
                                                 .light_window_size = 128,
                                                 .heavy_dim_head = 64,
                                                 .heavy_heads = 8,
                                                 .light_ff_mult = 0.5,
                                                 .heavy_ff_mult = 4};
constexpr auto of_twenty_steps = [] {
    auto config = flagship;
    config.router_kwargs.coor_descent.n_iters = 20;
    return config;
}();
constexpr colt5::TransformerBlockConfig small{.dim = 128,
                                              .num_heavy_attn_tokens_q = 64,
                                              .num_heavy_attn_tokens_kv = 64,
                                              .num_heavy_ff_tokens = 64,
                                              .light_dim_head = 32,
                                              .light_heads = 4,
                                              .light_window_size = 64,
                                              .heavy_dim_head = 32,
                                              .heavy_heads = 4,
                                              .light_ff_mult = 0.5,
                                              .heavy_ff_mult = 4};

}  // namespace

int main(int argc, char** argv) {
    using colt5::ConditionalRoutedTransformerBlock, bench::Scalar, bench::Policy;
    const bench::Inputs inputs(argc, argv);
    const auto& policy = inputs.policy;
    const bool is_small = inputs.number(0) == small.dim, has_fifty_steps = inputs.number(1) == 50;
    colt5::TransformerBlockCounts counts;
    if (const auto chosen = static_cast<colt5::Index>(inputs.number(2, 0)); chosen > 0)
        counts = {chosen, chosen, chosen};
    if (is_small) return serve_module(inputs, ConditionalRoutedTransformerBlock<small, Scalar, Policy>(policy), counts);
    if (has_fifty_steps)
        return serve_module(inputs, ConditionalRoutedTransformerBlock<flagship, Scalar, Policy>(policy), counts);
    return serve_module(inputs, ConditionalRoutedTransformerBlock<of_twenty_steps, Scalar, Policy>(policy), counts);
}
