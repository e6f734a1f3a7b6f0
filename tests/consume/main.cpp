// SPDX-License-Identifier: MIT
// A program that knows nothing but the installed library.
#include <colt5/colt5.hpp>
#include <cstdio>

#if defined(EXPECTS_OWN_EIGEN) && !defined(OWN_EIGEN)
#error "not the Eigen of this program"
#endif

constexpr colt5::TransformerBlockConfig config{.dim = 16,
                                               .num_heavy_attn_tokens_q = 4,
                                               .num_heavy_attn_tokens_kv = 4,
                                               .num_heavy_ff_tokens = 4,
                                               .light_dim_head = 8,
                                               .light_heads = 2,
                                               .light_window_size = 4,
                                               .heavy_dim_head = 8,
                                               .heavy_heads = 2};

int main() {
    const colt5::Cpu policy;
    const colt5::ConditionalRoutedTransformerBlock<config, float, colt5::Cpu> block{policy, colt5::Seed{0}};
    colt5::TokensTensor<float, colt5::Cpu> tokens(policy, {2, 32, 16});
    colt5::fill_normal(policy, tokens, colt5::Random(colt5::Seed{1}, 0));
    const auto out = block(tokens);
    std::printf("%td values\n", out.size());
    return out.size() == tokens.size() ? 0 : 1;
}
