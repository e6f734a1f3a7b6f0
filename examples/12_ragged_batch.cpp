// SPDX-License-Identifier: MIT
// Sequences of different lengths, packed without padding. Each routes a part of its own tokens.
#include <colt5/colt5.hpp>

#include <cstdio>
#include <vector>

int main() {
    using namespace colt5;
    constexpr TransformerBlockConfig config{.dim = 64,
                                            .num_heavy_attn_tokens_q = 32,
                                            .num_heavy_attn_tokens_kv = 64,
                                            .num_heavy_ff_tokens = 32,
                                            .light_dim_head = 16,
                                            .light_heads = 4,
                                            .light_window_size = 64,
                                            .heavy_dim_head = 16,
                                            .heavy_heads = 4};
    Cpu policy;
    const ConditionalRoutedTransformerBlock<config, float, Cpu> block{policy, Seed{0}};

    // [ragged]
    const Ragged ragged(block);
    const std::vector<Index> lengths{500, 20, 0, 3000};
    const auto cu_seqlens = cumulative_lengths(lengths);                       // 0, 500, 520, 520, 3520
    MatrixTensor<float, Cpu> tokens(policy, {cu_seqlens.back(), config.dim});  // (total, d)
    fill_normal(policy, tokens, Random(Seed{1}));

    const CountsByLength<TransformerBlockCounts> counts{
        .num_heavy_attn_tokens_q = TokenRatio{1.0 / 16},  // of the tokens of each sequence
        .num_heavy_attn_tokens_kv = [](Index length) { return length / 16 + 4; },
        .num_heavy_ff_tokens = 8};
    const auto saved = ragged.forward(tokens, cu_seqlens, counts);  // saved.out (total, d)
    auto gradients = block.make_gradients();
    const auto d_tokens = ragged.backward(saved, saved.out, gradients);  // (total, d)
    // [ragged]

    // The last sequence alone.
    const TokensView<const float> alone(tokens.view()[520].data(), {1, 3000, config.dim});
    const auto out = block(alone, {}, counts(3000));  // (1, 3000, d)
    const bool same = out.vector() == saved.out.vector().tail(out.size());
    std::printf("%td tokens in %zu sequences; the last one is %s\n", d_tokens.extent(0), lengths.size(),
                same ? "what it is alone" : "another than it is alone");
    return same ? 0 : 1;
}
