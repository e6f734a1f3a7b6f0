// SPDX-License-Identifier: MIT
// Training a block on the GPU in bfloat16: the program of 3_block.cpp with another header, policy and scalar type.

// [block]
#include <colt5/cuda.cuh>

#include <cstdio>

constexpr colt5::TransformerBlockConfig config{
    .dim = 512, .num_heavy_attn_tokens_q = 1024, .num_heavy_attn_tokens_kv = 1024, .num_heavy_ff_tokens = 1024};

int main() {
    colt5::Cuda policy;  // device 0; a stream of its own
    colt5::ConditionalRoutedTransformerBlock<config, colt5::bfloat16, colt5::Cuda> block{policy, colt5::Seed{0}};
    colt5::AdamW optimizer(policy, block, {.lr = 3e-4});  // trains a copy of the parameters in float

    colt5::TokensTensor<colt5::bfloat16, colt5::Cuda> tokens(policy, {2, 32768, 512});  // (b, n, d), on the device
    fill_normal(policy, tokens, colt5::Random(colt5::Seed{1}));

    auto gradients = block.make_gradients();  // float
    for (int step = 0; step < 10; ++step) {
        zero_gradients(policy, gradients);
        auto saved = block.forward(tokens);
        auto d_out = tensor_like(policy, saved.out);
        assign(policy, d_out, saved.out - tokens);  // the gradient of ½ ‖block(x) − x‖²
        std::printf("%.4g\n", sum_of_squares(policy, d_out));
        block.backward(std::move(saved), d_out, gradients);
        optimizer.step(block, gradients);
    }
}
// [block]
