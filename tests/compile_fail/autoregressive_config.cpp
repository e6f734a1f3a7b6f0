// SPDX-License-Identifier: MIT
// expect: colt5: AutoregressiveAttentionConfig.dim must be at least 1
// expect: colt5: AutoregressiveAttentionConfig.num_heavy_tokens_q and num_heavy_tokens_kv must be at least 1
// expect: colt5: AutoregressiveAttentionConfig: heads and dim_head must be at least 1, their product at most 2^40
// expect: colt5: AutoregressiveAttentionConfig.light_window_size and heavy_window_size must be in [1, 2^29]
// expect: colt5: AutoregressiveAttentionConfig.heavy_heads must be divisible by num_routed_kv
// expect: colt5: AutoregressiveAttentionConfig.heavy_dim_head must be even for rotary_emb
// expect: colt5: AutoregressiveAttentionConfig.router_kwargs takes no cosine_sim_routing or route_block_size
#include "wrong.hpp"

template <colt5::AutoregressiveAttentionConfig config>
using Module = colt5::ConditionalRoutedAutoregressiveAttention<config, float, colt5::Cpu>;
using Config = colt5::AutoregressiveAttentionConfig;

constexpr Config dim{.dim = wrong(0, 8), .num_heavy_tokens_q = 2, .num_heavy_tokens_kv = 2};
constexpr Config queries{.dim = 8, .num_heavy_tokens_q = wrong(0, 2), .num_heavy_tokens_kv = 2};
constexpr Config heads{.dim = 8, .num_heavy_tokens_q = 2, .num_heavy_tokens_kv = 2, .light_heads = wrong(0, 8)};
constexpr Config window{.dim = 8, .num_heavy_tokens_q = 2, .num_heavy_tokens_kv = 2, .light_window_size = wrong(0, 4)};
constexpr Config routes{.dim = 8, .num_heavy_tokens_q = 2, .num_heavy_tokens_kv = 2, .num_routed_kv = wrong(3, 4)};
constexpr Config odd{
    .dim = 8, .num_heavy_tokens_q = 2, .num_heavy_tokens_kv = 2, .heavy_dim_head = wrong(7, 8), .rotary_emb = true};
constexpr Config blocks{
    .dim = 8, .num_heavy_tokens_q = 2, .num_heavy_tokens_kv = 2, .router_kwargs = {.route_block_size = wrong(8, 0)}};

static_assert(complete<Module<dim>> && complete<Module<queries>> && complete<Module<heads>>);
static_assert(complete<Module<window>> && complete<Module<routes>> && complete<Module<odd>>);
static_assert(complete<Module<blocks>>);
