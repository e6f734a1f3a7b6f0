// SPDX-License-Identifier: MIT
// expect: colt5: CrossAttentionConfig.dim must be at least 1
// expect: colt5: CrossAttentionConfig.num_tokens_q must be at least 1
// expect: colt5: CrossAttentionConfig.num_tokens_kv must be at least 1
// expect: colt5: CrossAttentionConfig.heads and dim_head must be at least 1
// expect: colt5: CrossAttentionConfig.heads must be divisible by kv_routing_tokens
// expect: colt5: CrossAttentionConfig.heads must be divisible by q_routing_tokens
#include "wrong.hpp"

template <colt5::CrossAttentionConfig config>
using Module = colt5::ConditionalRoutedCrossAttention<config, float, colt5::Cpu>;
using Config = colt5::CrossAttentionConfig;

constexpr Config dim{.dim = wrong(0, 8), .num_tokens_q = 2, .num_tokens_kv = 2};
constexpr Config num_tokens_q{.dim = 8, .num_tokens_q = wrong(0, 2), .num_tokens_kv = 2};
constexpr Config num_tokens_kv{.dim = 8, .num_tokens_q = 2, .num_tokens_kv = wrong(0, 2)};
constexpr Config dim_head{.dim = 8, .num_tokens_q = 2, .num_tokens_kv = 2, .dim_head = wrong(0, 64)};
constexpr Config routing{.dim = 8, .num_tokens_q = 2, .num_tokens_kv = 2, .kv_routing_tokens = wrong(3, 2)};
constexpr Config q_routing{.dim = 8, .num_tokens_q = 2, .num_tokens_kv = 2, .q_routing_tokens = wrong(3, 2)};

static_assert(complete<Module<dim>> && complete<Module<num_tokens_q>> && complete<Module<num_tokens_kv>>);
static_assert(complete<Module<dim_head>> && complete<Module<routing>> && complete<Module<q_routing>>);
