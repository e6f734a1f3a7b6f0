// SPDX-License-Identifier: MIT
// expect: colt5: AttentionConfig.dim must be at least 1
// expect: colt5: AttentionConfig.num_heavy_tokens_q must be at least 1
// expect: colt5: AttentionConfig.num_heavy_tokens_kv must be at least 1
// expect: colt5: AttentionConfig.light_heads and light_dim_head must be at least 1
// expect: colt5: AttentionConfig.heavy_heads and heavy_dim_head must be at least 1, their product at most 2^40
// expect: colt5: AttentionConfig.light_window_size must be at least 2
// expect: colt5: AttentionConfig.light_window_size must be at most 2^32
// expect: colt5: AttentionConfig.heavy_heads must be divisible by num_routed_kv
// expect: colt5: AttentionConfig.heavy_heads must be divisible by num_routed_q
// expect: colt5: AttentionConfig.relative_position_num_buckets must be even and at least 4
// expect: colt5: AttentionConfig.heavy_dim_head must be even for rotary_emb
// expect: colt5: AttentionConfig.light_dim_head must be even for light_rotary_emb
// expect: colt5: AttentionConfig.use_relative_position_bias and light_rotary_emb are not for light_in_windows
// expect: colt5: AttentionConfig.masked_rows and attends_to_padding are not for light_in_windows
// expect: colt5: attention in windows is not causal: it does not take RouterType::causal
// expect: colt5: AttentionConfig.masked_rows and attends_to_padding are not for RouterType::causal
// expect: colt5: ImageAttentionConfig.light_window_size must be at least 2 and at most 2^15
#include "wrong.hpp"

template <colt5::AttentionConfig config>
using Module = colt5::ConditionalRoutedAttention<config, float, colt5::Cpu>;
using Config = colt5::AttentionConfig;

constexpr Config dim{.dim = wrong(0, 8), .num_heavy_tokens_q = 2, .num_heavy_tokens_kv = 2};
constexpr Config num_heavy_tokens_q{.dim = 8, .num_heavy_tokens_q = wrong(0, 2), .num_heavy_tokens_kv = 2};
constexpr Config num_heavy_tokens_kv{.dim = 8, .num_heavy_tokens_q = 2, .num_heavy_tokens_kv = wrong(-1, 2)};
constexpr Config light{.dim = 8, .num_heavy_tokens_q = 2, .num_heavy_tokens_kv = 2, .light_dim_head = wrong(0, 64)};
constexpr Config heavy{.dim = 8,
                       .num_heavy_tokens_q = 2,
                       .num_heavy_tokens_kv = 2,
                       .heavy_heads = wrong(colt5::Index{1} << 40, colt5::Index{8})};
constexpr Config window{.dim = 8, .num_heavy_tokens_q = 2, .num_heavy_tokens_kv = 2, .light_window_size = wrong(1, 2)};
constexpr Config endless{.dim = 8,
                         .num_heavy_tokens_q = 2,
                         .num_heavy_tokens_kv = 2,
                         .light_window_size = wrong(0x7FFFFFFFFFFFFFFF, 0x100000000)};
constexpr Config routed{.dim = 8, .num_heavy_tokens_q = 2, .num_heavy_tokens_kv = 2, .num_routed_kv = wrong(3, 4)};
constexpr Config routed_q{.dim = 8, .num_heavy_tokens_q = 2, .num_heavy_tokens_kv = 2, .num_routed_q = wrong(0, 4)};
constexpr Config odd{
    .dim = 8, .num_heavy_tokens_q = 2, .num_heavy_tokens_kv = 2, .relative_position_num_buckets = wrong(33, 32)};
constexpr Config near{
    .dim = 8, .num_heavy_tokens_q = 2, .num_heavy_tokens_kv = 2, .relative_position_max_distance = wrong(8, 9)};
constexpr Config odd_heavy{
    .dim = 8, .num_heavy_tokens_q = 2, .num_heavy_tokens_kv = 2, .heavy_dim_head = wrong(7, 8), .rotary_emb = true};
constexpr Config odd_light{.dim = 8,
                           .num_heavy_tokens_q = 2,
                           .num_heavy_tokens_kv = 2,
                           .light_dim_head = wrong(7, 8),
                           .light_rotary_emb = true};
constexpr Config windows{.dim = 8,
                         .num_heavy_tokens_q = 2,
                         .num_heavy_tokens_kv = 2,
                         .light_rotary_emb = wrong(true, false),
                         .light_in_windows = true};
constexpr Config padded_windows{.dim = 8,
                                .num_heavy_tokens_q = 2,
                                .num_heavy_tokens_kv = 2,
                                .attends_to_padding = wrong(true, false),
                                .light_in_windows = true};
constexpr Config causal_windows{.dim = 8,
                                .num_heavy_tokens_q = 2,
                                .num_heavy_tokens_kv = 2,
                                .router_type = colt5::RouterType::causal,
                                .light_in_windows = wrong(true, false)};
constexpr Config causal_padding{.dim = 8,
                                .num_heavy_tokens_q = 2,
                                .num_heavy_tokens_kv = 2,
                                .router_type = colt5::RouterType::causal,
                                .attends_to_padding = wrong(true, false)};
constexpr colt5::ImageAttentionConfig image{
    .dim = 8, .num_heavy_tokens_q = 2, .num_heavy_tokens_kv = 2, .light_window_size = wrong(0, 4)};

static_assert(complete<Module<dim>> && complete<Module<num_heavy_tokens_q>> && complete<Module<num_heavy_tokens_kv>>);
static_assert(complete<Module<light>> && complete<Module<heavy>> && complete<Module<window>>);
static_assert(complete<Module<routed>> && complete<Module<routed_q>> && complete<Module<endless>>);
static_assert(complete<Module<odd>> && complete<Module<near>>);
static_assert(complete<Module<odd_heavy>> && complete<Module<odd_light>>);
static_assert(complete<Module<padded_windows>>);
static_assert(complete<Module<causal_windows>> && complete<Module<causal_padding>>);
static_assert(complete<Module<windows>> && complete<colt5::ConditionalRoutedImageAttention<image, float, colt5::Cpu>>);
