// SPDX-License-Identifier: MIT
// Prints all bits of what a training step computes: the same, whether the kernels are compiled here or in float.cpp.
#include <colt5/colt5.hpp>

#include <bit>
#include <cstdint>
#include <cstdio>
#include <string>

int main() {
    using namespace colt5;
    constexpr TransformerBlockConfig config{.dim = 72,
                                            .num_heavy_attn_tokens_q = 24,
                                            .num_heavy_attn_tokens_kv = 40,
                                            .num_heavy_ff_tokens = 24,
                                            .light_dim_head = 24,
                                            .light_heads = 3,
                                            .light_window_size = 32,
                                            .heavy_dim_head = 40,
                                            .heavy_heads = 2,
                                            .use_relative_position_bias = true};
    using Block = ConditionalRoutedTransformerBlock<config, float, Cpu>;
    const Cpu policy{2};
    Block block{policy, Seed{0}};
    AdamW optimizer(policy, block, {.lr = 1e-2});
    TokensTensor<float, Cpu> tokens(policy, {2, 300, config.dim});
    fill_normal(policy, tokens, Random(Seed{1}));
    auto gradients = block.make_gradients();
    for (int step = 0; step < 2; ++step) {
        zero_gradients(policy, gradients);
        auto saved = block.forward(tokens);
        const auto d_out = transfer(policy, policy, saved.out);
        const auto d_tokens = block.backward(std::move(saved), d_out, gradients);
        optimizer.step(block, gradients);
        const auto print = [&](const std::string& name, const auto& tensor) {
            std::uint64_t sum = 0;
            for (const float value : to_host(policy, tensor)) sum = sum * 31 + std::bit_cast<std::uint32_t>(value);
            std::printf("%s %016llx\n", name.c_str(), static_cast<unsigned long long>(sum));
        };
        print("d_tokens", d_tokens);
        Block::each_parameter([&](const std::string& name, const auto& tensor) { print(name, tensor); }, "", block);
    }
}
