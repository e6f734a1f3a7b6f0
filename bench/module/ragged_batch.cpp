// SPDX-License-Identifier: MIT
// The flagship block on a batch of b sequences of n/b, 2 n/b, …, n tokens, which x (1, n (b + 1)/2, 512) holds without
// padding. Numbers: b; 0 for packed sequences, 1 for padded ones, which a mask hides, 2 for as many tokens in b
// sequences of one length.
#include <vector>

#include "../measure.hpp"

namespace {

constexpr colt5::TransformerBlockConfig config{.dim = 512,
                                               .num_heavy_attn_tokens_q = 1024,
                                               .num_heavy_attn_tokens_kv = 1024,
                                               .num_heavy_ff_tokens = 1024,
                                               .light_dim_head = 64,
                                               .light_heads = 8,
                                               .light_window_size = 128,
                                               .heavy_dim_head = 64,
                                               .heavy_heads = 8,
                                               .light_ff_mult = 0.5,
                                               .heavy_ff_mult = 4};
using Block = colt5::ConditionalRoutedTransformerBlock<config, bench::Scalar, bench::Policy>;
using colt5::Index;

/// Packed tokens (1, total, d), each sequence behind the one before → (b, n, d), with zeros behind each.
bench::Tokens padded(const bench::Policy& policy, const bench::Tokens& x, const std::vector<Index>& lengths) {
    bench::Tokens tokens(policy, {static_cast<Index>(lengths.size()), lengths.back(), x.extent(2)});
    colt5::set_zero(policy, tokens);
    Index first = 0, b = 0;
    for (const Index length : lengths) {
        auto to = tokens.view()[b++].range(0, length);
        assign(policy, to, as_expression(x.const_view()[0].range(first, length)));
        first += length;
    }
    return tokens;
}

}  // namespace

int main(int argc, char** argv) {
    const bench::Inputs inputs(argc, argv);
    const auto& policy = inputs.policy;
    Block block(policy);
    inputs.load(block);
    bench::Tokens x = inputs.tokens("x"), d_out = inputs.tokens("d_out");
    const auto batch = static_cast<Index>(inputs.number(0));
    const auto form = static_cast<int>(inputs.number(1));
    const Index total = x.extent(1), longest = 2 * total / (batch + 1);
    std::vector<Index> lengths;
    for (Index b = 1; b <= batch; ++b) lengths.push_back(b * longest / batch);
    constexpr colt5::TransformerBlockCounts counts{256, 256, 256};  // fewer than the shortest sequence has
    const auto cu_seqlens = colt5::cumulative_lengths(lengths);
    colt5::expect_value(cu_seqlens.back() == total, "x", "of as many tokens as the sequences", total);

    if (form == 0) {
        const colt5::Ragged ragged(block);
        const auto tokens = x.const_view()[0], d = (d_out ? d_out : x).const_view()[0];
        return bench::serve(policy, [&](bool backward, const bench::Keep& keep) {
            if (!backward) return keep(ragged(tokens, cu_seqlens, counts));
            auto saved = ragged.forward(tokens, cu_seqlens, counts);
            auto gradients = block.make_gradients();
            keep(ragged.backward(std::move(saved), d, gradients));
        });
    }
    colt5::Tensor<bool, bench::Policy, bench::dynamic, bench::dynamic> mask;
    if (form == 1) {
        x = padded(policy, x, lengths);
        if (d_out) d_out = padded(policy, d_out, lengths);
        mask = {policy, {batch, longest}};
        fill_with(policy, mask, [&](std::size_t i) {
            const auto at = static_cast<Index>(i);
            return at % longest < lengths[static_cast<std::size_t>(at / longest)];
        });
    }
    const std::array shape{batch, form == 1 ? longest : total / batch, config.dim};
    const auto tokens = x.const_view().reshape(shape), d = (d_out ? d_out : x).const_view().reshape(shape);
    const colt5::Mask real = mask ? colt5::Mask(mask) : colt5::Mask();
    return bench::serve(policy, [&](bool backward, const bench::Keep& keep) {
        if (!backward) return keep(block(tokens, real, counts));
        auto saved = block.forward(tokens, real, counts);
        auto gradients = block.make_gradients();
        keep(block.backward(std::move(saved), d, gradients));
    });
}
