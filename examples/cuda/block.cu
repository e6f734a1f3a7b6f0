// SPDX-License-Identifier: MIT
// A block on the GPU: 3_block.cpp with another header and another policy.

// [block]
#include <colt5/cuda.cuh>

#include <cstdio>

constexpr colt5::TransformerBlockConfig config{
    .dim = 512, .num_heavy_attn_tokens_q = 1024, .num_heavy_attn_tokens_kv = 1024, .num_heavy_ff_tokens = 1024};

int main() {
    colt5::Cuda policy({.math = colt5::MathMode::tf32});
    colt5::ConditionalRoutedTransformerBlock<config, float, colt5::Cuda> block{policy, colt5::Seed{0}};

    colt5::TokensTensor<float, colt5::Cuda> tokens(policy, {2, 32768, 512});  // (b, n, d), on the device
    fill_normal(policy, tokens, colt5::Random(colt5::Seed{1}));

    auto pass = block.forward(tokens);
    auto gradients = block.make_gradients();
    auto d_tokens = block.backward(std::move(pass), tokens, gradients);
    std::printf("%g\n", to_host(policy, d_tokens)[0]);
}
// [block]
