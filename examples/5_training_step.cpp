// SPDX-License-Identifier: MIT
// Training: forward, backward and AdamW on one block that learns to reproduce a target.
#include <colt5/colt5.hpp>

#include <cstdio>

int main() {
    using namespace colt5;
    // [training]
    // To train a router, let its coordinate descent converge and give its logits a standard deviation of about 1. At
    // the reference's √dim, its 50 steps leave most scores saturated, and the router's gradient is close to 0.
    constexpr TransformerBlockConfig config{
        .dim = 32,
        .num_heavy_attn_tokens_q = 16,
        .num_heavy_attn_tokens_kv = 16,
        .num_heavy_ff_tokens = 16,
        .light_dim_head = 8,
        .light_heads = 4,
        .light_window_size = 16,
        .heavy_dim_head = 8,
        .heavy_heads = 4,
        .router_kwargs = {.coor_descent = {.score_scale = 0.1767766952966369, .iterate_to_convergence = true}}};
    using Block = ConditionalRoutedTransformerBlock<config, float, Cpu>;
    Cpu policy;
    Block block{policy, Seed{0}};
    AdamW optimizer(policy, block, {.lr = 3e-3});

    TokensTensor<float, Cpu> tokens(policy, {4, 128, config.dim}), target(policy, {4, 128, config.dim});
    fill_normal(policy, tokens, Random(Seed{1}));
    fill_normal(policy, target, Random(Seed{2}));

    auto gradients = block.make_gradients();
    auto d_out = tensor_like(policy, target);
    float first = 0, loss = 0;
    for (int step = 0; step < 100; ++step) {
        auto saved = block.forward(tokens);         // the output, and what backward reads
        assign(policy, d_out, saved.out - target);  // gradient of the loss ‖out − target‖² / 2
        loss = d_out.matrix().squaredNorm() / 2;
        if (step == 0) first = loss;

        zero_gradients(policy, gradients);
        auto d_tokens = block.backward(std::move(saved), d_out, gradients);  // frees `saved` as it reads it
        clip_gradient_norm(policy, gradients, 1.0);
        optimizer.step(block, gradients);
    }
    // [training]
    std::printf("loss %.1f -> %.1f\n", first, loss);
    return loss < first / 2 ? 0 : 1;
}
