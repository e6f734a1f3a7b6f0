// SPDX-License-Identifier: MIT
// What a forward pass routed, what a module holds, and how much memory the policy has.
#include <colt5/colt5.hpp>
#include <colt5/router/router_view.hpp>

#include <cstdio>

int main() {
    using namespace colt5;
    constexpr TransformerBlockConfig config{.dim = 32,
                                            .num_heavy_attn_tokens_q = 16,
                                            .num_heavy_attn_tokens_kv = 24,
                                            .num_heavy_ff_tokens = 8,
                                            .light_dim_head = 8,
                                            .light_heads = 4,
                                            .light_window_size = 16,
                                            .heavy_dim_head = 8,
                                            .heavy_heads = 4};
    const Cpu policy;
    using Block = ConditionalRoutedTransformerBlock<config, float, Cpu>;
    const Block block{policy, Seed{0}};
    TokensTensor<float, Cpu> tokens(policy, {2, 128, 32});
    fill_normal(policy, tokens, Random(Seed{1}));

    // [inside]
    const auto saved = block.forward(tokens);
    saved.each_router([&](const std::string& name, const auto& view) {  // the three routers of a block
        const auto summary = summarize(policy, view);
        std::printf("%s: %g of %td tokens of the first sequence, first token %d with score %g, smallest logit %g\n",
                    name.c_str(), summary.live.view()(0, 0), tokens.extent(1), view.indices(0, 0, 0),
                    view.scores(0, 0, 0), summary.thresholds.view()(0, 0));
    });

    Block::each_parameter([](const std::string& name,
                             const auto& value) { std::printf("%s: %td numbers\n", name.c_str(), value.size()); },
                          "", block);

    const WorkspaceStatistics memory = policy.workspace()->statistics();
    std::printf("%zu bytes in use, %zu at most\n", memory.in_use, memory.peak);
    // [inside]
}
