// SPDX-License-Identifier: MIT
// Mixture-of-Depths (Raposo et al. 2024): a whole CoLT5 block for one token in eight, none for the others. Tokens with
// a mark are to become 0, and the router learns to choose them. (It gets a gradient from tokens that it has chosen
// only, so some seeds fail.)
#include <colt5/colt5.hpp>

#include <algorithm>
#include <cstdio>

using namespace colt5;

constexpr TransformerBlockConfig block_config{.dim = 16,
                                              .num_heavy_attn_tokens_q = 8,
                                              .num_heavy_attn_tokens_kv = 8,
                                              .num_heavy_ff_tokens = 8,
                                              .light_dim_head = 8,
                                              .light_heads = 2,
                                              .light_window_size = 8};
constexpr RoutedConfig config{.dim = 16,
                              .num_heavy_tokens = 16,  // of 128
                              .sequence_order = true,  // the block sees its tokens as they stand in the sequence
                              .router_straight_through = false,
                              .router_kwargs = {.coor_descent = {.score_scale = 0.25, .iterate_to_convergence = true}}};
using Block = ConditionalRoutedTransformerBlock<block_config, float, Cpu>;
using MixtureOfDepths = Routed<config, float, Cpu, AsBranch<Block>>;  // no light branch

int main() {
    constexpr Index batch = 4, length = 128, dim = config.dim;
    Cpu policy;
    MixtureOfDepths depths{policy, Seed{2}};
    AdamW optimizer(policy, depths, {.lr = 2e-2});
    TokensTensor<float, Cpu> tokens(policy, {batch, length, dim}), d_out(policy, tokens.shape());
    auto gradients = depths.make_gradients();
    const auto is_marked = [](Index b, Index i) { return (3 * i + b) % 8 == 0; };

    Index marked = 0;
    for (std::uint64_t step = 0; step <= 250; ++step) {
        fill_normal(policy, tokens, Random(Seed{1}, step));
        auto target = tensor_like(policy, tokens);
        for (Index b = 0; b < batch; ++b)
            for (Index i = 0; i < length; ++i) tokens.view()(b, i, 0) = is_marked(b, i) ? 2 : -2;
        for (Index j = 0; j < target.size(); ++j)
            target.data()[j] = is_marked(j / dim / length, j / dim % length) ? 0 : tokens.data()[j];

        auto saved = depths.forward(tokens, {}, {}, Residual::tokens);  // x_i + score_i · block(x)_i [i chosen]
        assign(policy, d_out, (saved.out - target) / float(target.size()));
        const auto indices = saved.routed.routing.indices.const_view();  // (b, 1, k)
        marked = 0;
        for (Index j = 0; j < indices.size(); ++j) marked += is_marked(j / (length / 8), indices.data()[j]);
        if (step % 50 == 0)
            std::printf("step %3d: %2td of %td chosen tokens have the mark\n", int(step), marked, indices.size());

        zero_gradients(policy, gradients);
        depths.backward(std::move(saved), d_out, gradients);
        optimizer.step(depths, gradients);
    }
    return marked > 48 ? 0 : 1;
}
