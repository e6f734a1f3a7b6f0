// SPDX-License-Identifier: MIT
// The next token of b sequences, x (b, 1, 512), by the flagship block with causal routers, from a cache. Before the
// first command the sequences get a number of tokens, numbers[0], the same 2048 again and again; each call then adds
// one. A sixteenth of the tokens is routed, until 600 are chosen: from 10,000 tokens on, the heavy branch does not grow
// any more.
#include "../measure.hpp"

namespace {

constexpr colt5::TransformerBlockConfig config{.dim = 512,
                                               .num_heavy_attn_tokens_q = 1 << 20,
                                               .num_heavy_attn_tokens_kv = 600,
                                               .num_heavy_ff_tokens = 1 << 20,
                                               .light_dim_head = 64,
                                               .light_heads = 8,
                                               .light_window_size = 128,
                                               .heavy_dim_head = 64,
                                               .heavy_heads = 8,
                                               .light_ff_mult = 0.5,
                                               .heavy_ff_mult = 4,
                                               .router_type = colt5::RouterType::causal,
                                               .router_kwargs = {.causal = {.rate = 1.0 / 16}}};
using Block = colt5::ConditionalRoutedTransformerBlock<config, bench::Scalar, bench::Policy>;
using colt5::Index;

}  // namespace

int main(int argc, char** argv) {
    const bench::Inputs inputs(argc, argv);
    const auto& policy = inputs.policy;
    Block block(policy);
    inputs.load(block);
    const bench::Tokens x = inputs.tokens("x");
    const auto past = static_cast<Index>(inputs.number(0));
    constexpr Index at_a_time = 2048, calls = 1 << 20;
    auto cache = block.make_cache(x.extent(0), past + calls);
    const auto prompt = [&](Index count) {
        bench::Tokens tokens(policy, {x.extent(0), count, x.extent(2)});
        fill_normal(policy, tokens, colt5::Random(colt5::Seed{1}, 0));
        return tokens;
    };
    const auto first = prompt(past % at_a_time), others = prompt(at_a_time);
    block.decode(cache, first);
    for (Index at = first.extent(1); at < past; at += at_a_time) block.decode(cache, others);
    return bench::serve(policy, [&](bool, const bench::Keep& keep) { keep(block.decode(cache, x)); });
}
