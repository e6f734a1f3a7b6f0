// SPDX-License-Identifier: MIT
// A CoLT5 encoder block, x = attn(x) + x; x = ff(x) + x, at the size of the reference's README.

#include <colt5/colt5.hpp>

#include <chrono>
#include <cstdio>

constexpr colt5::TransformerBlockConfig config{.dim = 512,
                                               .num_heavy_attn_tokens_q = 1024,
                                               .num_heavy_attn_tokens_kv = 1024,
                                               .num_heavy_ff_tokens = 1024,
                                               .light_dim_head = 64,
                                               .light_heads = 8,
                                               .light_window_size = 128,
                                               .heavy_dim_head = 64,
                                               .heavy_heads = 8};

int main() {
    colt5::Cpu policy;
    colt5::ConditionalRoutedTransformerBlock<config, float, colt5::Cpu> block{policy, colt5::Seed{0}};

    colt5::TokensTensor<float, colt5::Cpu> tokens(policy, {1, 4096, 512});  // (b, n, d)
    fill_normal(policy, tokens, colt5::Random(colt5::Seed{1}));

    const auto start = std::chrono::steady_clock::now();
    const auto out = block(tokens);  // (b, n, d): inference, keeps nothing
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    std::printf("%td parameters, %td tokens, %.2f s\n", count_parameters(block), out.extent(1), time.count());
}
