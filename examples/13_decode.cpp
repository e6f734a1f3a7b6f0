// SPDX-License-Identifier: MIT
// Decoding: two sequences are continued token by token, from a cache. The outputs are those of the whole sequences.
#include <colt5/colt5.hpp>

#include <algorithm>
#include <cstdio>

int main() {
    using namespace colt5;
    // [decode]
    // A causal router: whether a token is routed depends only on the token itself and on earlier ones; about one in
    // eight is. The cache keeps the keys and values of the first 200 tokens that are chosen for them; later ones are
    // not chosen.
    constexpr TransformerBlockConfig config{.dim = 64,
                                            .num_heavy_attn_tokens_q = 200,
                                            .num_heavy_attn_tokens_kv = 200,
                                            .num_heavy_ff_tokens = 200,
                                            .light_dim_head = 16,
                                            .light_heads = 4,
                                            .light_window_size = 64,  // a token sees itself and 32 before it
                                            .heavy_dim_head = 16,
                                            .heavy_heads = 4,
                                            .router_type = RouterType::causal,
                                            .router_kwargs = {.causal = {.rate = 1.0 / 8}}};
    using Model = Stack<ConditionalRoutedTransformerBlock<config, float, Cpu>, 2>;
    Cpu policy;
    const Model model(policy, Seed{0});

    constexpr Index batch = 2, max_length = 1000;
    auto cache = model.make_cache(batch, max_length);  // decode throws when a sequence gets longer
    std::printf("a cache of %td bytes\n", Model::cache_bytes(batch, max_length));

    TokensTensor<float, Cpu> prompts(policy, {batch, 300, config.dim});
    fill_normal(policy, prompts, Random(Seed{1}));
    // All 300 tokens of the first sequence and 120 of the second: the others are padding.
    const auto first = model.decode(cache, prompts, {300, 120});  // (2, 300, 64)
    // One more token of each. A model with a vocabulary would sample it from the last output.
    TokensTensor<float, Cpu> next(policy, {batch, 1, config.dim});
    fill_normal(policy, next, Random(Seed{2}));
    const auto out = model.decode(cache, next);  // (2, 1, 64)
    // [decode]

    // The same from the whole second sequence.
    TokensTensor<float, Cpu> whole(policy, {1, 121, config.dim});
    std::copy_n(prompts.view()[1].data(), 120 * config.dim, whole.data());
    std::copy_n(next.view()[1].data(), config.dim, whole.view()[0][120].data());
    const auto expected = model(whole);
    const double difference = (out.matrix().row(1) - expected.matrix().row(120)).norm();
    std::printf("tokens so far: %td and %td; difference from the output for the whole sequence: %g\n",
                cache.lengths()[0], cache.lengths()[1], difference);
    return difference < 1e-4 && first.extent(1) == 300 ? 0 : 1;
}
