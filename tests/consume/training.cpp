// SPDX-License-Identifier: MIT
// A program that trains, saves and goes on, small enough to be compiled at each level of optimization, where GCC warns
// of different things. (tests/compilers/strict.cpp has all that is public.)
#include <colt5/colt5.hpp>
#include <colt5/io/adamw.hpp>
#include <colt5/io/parameters.hpp>
#include <cstdint>
#include <cstdio>
#include <string>

constexpr colt5::TransformerBlockConfig config{.dim = 16,
                                               .num_heavy_attn_tokens_q = 4,
                                               .num_heavy_attn_tokens_kv = 4,
                                               .num_heavy_ff_tokens = 4,
                                               .light_dim_head = 8,
                                               .light_heads = 2,
                                               .light_window_size = 4,
                                               .heavy_dim_head = 8,
                                               .heavy_heads = 2};
using Block = colt5::ConditionalRoutedTransformerBlock<config, float, colt5::Cpu>;

int main(int, char** arguments) {
    const std::string path = std::string(arguments[0]) + ".safetensors", optimizer_path = path + ".optimizer";
    const colt5::Cpu policy;
    Block block{policy, colt5::Seed{0}};
    colt5::AdamW optimizer(policy, block, {.lr = 1e-3});
    colt5::TokensTensor<float, colt5::Cpu> tokens(policy, {2, 32, 16});
    colt5::fill_normal(policy, tokens, colt5::Random(colt5::Seed{1}, 0));
    auto gradients = block.make_gradients();
    auto d_out = colt5::tensor_like(policy, tokens);
    for (int step = 0; step < 3; ++step) {
        auto saved = block.forward(tokens);
        assign(policy, d_out, saved.out - tokens);
        colt5::zero_gradients(policy, gradients);
        block.backward(std::move(saved), d_out, gradients);
        colt5::clip_gradient_norm(policy, gradients, 1.0);
        optimizer.step(block, gradients);
    }
    colt5::save_parameters(policy, path, block, {{"steps", std::to_string(3)}});
    colt5::save_optimizer(policy, optimizer_path, optimizer);
    colt5::load_parameters(policy, path, block);
    colt5::load_optimizer(policy, optimizer_path, optimizer);

    const colt5::SafetensorsFile file(optimizer_path);
    const auto steps = file.read<std::int64_t>("step");
    for (const auto& [name, entry] : file.entries())
        std::printf("%s of %zu elements, %td-dimensional\n", name.c_str(), entry.size(),
                    static_cast<std::ptrdiff_t>(entry.shape.size()));
    colt5::save_safetensors(path, {{"tokens", tokens}}, {{"source", "noise"}});
    return steps.at(0) == 3 ? 0 : 1;
}
