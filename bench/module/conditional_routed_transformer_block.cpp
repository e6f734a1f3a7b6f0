// SPDX-License-Identifier: MIT
// The block of the reference's README, and with the number 128 one of that dimension.
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
    const bench::Inputs inputs(argc, argv);
    using colt5::ConditionalRoutedTransformerBlock, colt5::Cpu;
    if (inputs.number(0) == small.dim)
        return bench::serve_module<ConditionalRoutedTransformerBlock<small, float, Cpu>>(inputs);
    return bench::serve_module<ConditionalRoutedTransformerBlock<flagship, float, Cpu>>(inputs);
}
