// SPDX-License-Identifier: MIT
// Conditional attention: local attention for every token, full attention among the routed ones; padding is masked.
#include <colt5/colt5.hpp>

#include <cstdio>

int main() {
    using namespace colt5;
    constexpr AttentionConfig config{.dim = 64,
                                     .num_heavy_tokens_q = 32,
                                     .num_heavy_tokens_kv = 48,
                                     .num_routed_kv = 2,  // two sets of keys and values, each for half of the heads
                                     .light_dim_head = 16,
                                     .light_heads = 4,
                                     .light_window_size = 64,
                                     .heavy_dim_head = 16,
                                     .heavy_heads = 4};
    Cpu policy;
    ConditionalRoutedAttention<config, float, Cpu> attention{policy, Seed{0}};

    const Index batch = 2, length = 500;  // any length
    TokensTensor<float, Cpu> tokens(policy, {batch, length, config.dim});
    fill_normal(policy, tokens, Random(Seed{1}));

    // The second sequence has 300 real tokens.
    Tensor<bool, Cpu, dynamic, dynamic> mask(policy, {batch, length});
    fill_with(policy, mask, [&](std::size_t i) { return static_cast<Index>(i) < length + 300; });

    const auto out = attention(tokens, mask);

    // What stands in the padding changes nothing for real tokens.
    for (Index i = 300; i < length; ++i) tokens.view()(1, i, 0) = 1000;
    const auto again = attention(tokens, mask);
    const auto real = [&](const auto& x) { return x.matrix().topRows(length + 300); };
    std::printf("change of the real tokens when the padding changes: %g\n", (real(out) - real(again)).norm());
    return real(out) == real(again) ? 0 : 1;
}
