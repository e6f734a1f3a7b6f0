// SPDX-License-Identifier: MIT
#include <colt5/colt5.hpp>

#include "module/decode.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr CausalKwargs routing{.rate = 0.3, .block_size = 16, .score_scale = 0.3};

constexpr AttentionConfig plain{.dim = 20,
                                .num_heavy_tokens_q = 1000,
                                .num_heavy_tokens_kv = 1000,
                                .light_dim_head = 4,
                                .light_heads = 3,
                                .light_window_size = 16,
                                .heavy_dim_head = 8,
                                .heavy_heads = 2,
                                .router_straight_through = false,
                                .router_type = RouterType::causal,
                                .router_kwargs = {.causal = routing}};
/// Keys end before sequences do.
constexpr AttentionConfig everything{.dim = 16,
                                     .num_heavy_tokens_q = 70,
                                     .num_heavy_tokens_kv = 50,
                                     .num_routed_kv = 2,
                                     .num_routed_q = 4,
                                     .light_dim_head = 6,
                                     .light_heads = 2,
                                     .light_window_size = 140,
                                     .heavy_dim_head = 4,
                                     .heavy_heads = 4,
                                     .router_straight_through = false,
                                     .router_type = RouterType::causal,
                                     .router_kwargs = {.causal = routing},
                                     .use_null_kv = true,
                                     .use_null_q_tokens = true,
                                     .multiply_keys_by_score = true,
                                     .multiply_queries_by_score = true,
                                     .use_relative_position_bias = true,
                                     .rotary_emb = true,
                                     .light_rotary_emb = true};
constexpr AttentionConfig heavy_alone{.dim = 12,
                                      .num_heavy_tokens_q = 1000,
                                      .num_heavy_tokens_kv = 1000,
                                      .heavy_dim_head = 4,
                                      .heavy_heads = 2,
                                      .router_type = RouterType::causal,
                                      .router_kwargs = {.causal = routing},
                                      .has_light_attn = false,
                                      .use_null_kv = true};
/// A window of several blocks of keys.
constexpr AttentionConfig wide{.dim = 8,
                               .num_heavy_tokens_q = 100,
                               .num_heavy_tokens_kv = 1000,
                               .light_dim_head = 4,
                               .light_heads = 1,
                               .light_window_size = 1400,
                               .heavy_dim_head = 4,
                               .heavy_heads = 1,
                               .router_type = RouterType::causal,
                               .router_kwargs = {.causal = {.rate = 0.5}}};

template <AttentionConfig config, typename T>
using Module = ConditionalRoutedAttention<config, T, Cpu>;

constexpr TransformerBlockConfig block{.dim = 16,
                                       .num_heavy_attn_tokens_q = 200,
                                       .num_heavy_attn_tokens_kv = 60,
                                       .num_heavy_ff_tokens = 80,
                                       .light_dim_head = 4,
                                       .light_heads = 2,
                                       .light_window_size = 30,
                                       .heavy_dim_head = 8,
                                       .heavy_heads = 2,
                                       .router_type = RouterType::causal,
                                       .router_kwargs = {.causal = routing},
                                       .rotary_emb = true,
                                       .light_rotary_emb = true};
template <typename T>
using Block = ConditionalRoutedTransformerBlock<block, T, Cpu>;

}  // namespace

TEST_CASE_TEMPLATE("decode of attention", M, Module<plain, float>, Module<plain, double>, Module<everything, float>,
                   Module<heavy_alone, float>) {
    check_decode<M>(333);
}

TEST_CASE("decode of attention: a window of several blocks of keys") {
    check_decode<Module<wide, float>>(is_sanitized ? 600 : 1700);
}

TEST_CASE_TEMPLATE("decode of blocks and of a stack", M, Block<float>, Stack<Block<float>, 3>) {
    check_decode<M>(260);
}
