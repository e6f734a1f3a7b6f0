// SPDX-License-Identifier: MIT
#pragma once

#include <optional>

#include <colt5/op/local_attention.hpp>
#include <colt5/router/routers.hpp>

/// Configurations of the modules, known at compile time: the reference's constructor arguments under its names, and
/// options of this library's own. C++ wants fields named in the order in which they are declared; those without a
/// default must be given.
namespace colt5 {

struct RoutedConfig {
    Index dim;
    Index num_heavy_tokens;     ///< of each route
    Index num_routes = 1;       ///< sets of tokens, each routed by its own routing token
    bool shared_heavy = false;  ///< one heavy module for all routes; otherwise one for each
    /// Heavy modules see tokens as they stand in the sequence; otherwise those with the largest logits come first.
    bool sequence_order = false;
    bool router_straight_through = true;
    RouterType router_type = RouterType::coor_descent;
    RouterKwargs router_kwargs{};
};

/// Which feedforward the branches are: FeedForward, as in the package, or GatedFeedForward, as in T5 1.1 and the paper.
enum class FeedForwardType { plain, gated };

struct FeedForwardConfig {
    Index dim;
    Index num_heavy_tokens;
    FeedForwardType feed_forward = FeedForwardType::plain;
    double light_ff_mult = 0.5;  ///< hidden width of the light branch, as a multiple of dim
    double heavy_ff_mult = 4;
    bool router_straight_through = true;
    RouterType router_type = RouterType::coor_descent;
    RouterKwargs router_kwargs{};
};

struct AttentionConfig {
    Index dim;
    Index num_heavy_tokens_q;
    Index num_heavy_tokens_kv;
    Index num_routed_kv = 1;  ///< sets of keys and values, each routed by its own routing token
    Index num_routed_q = 1;   ///< sets of queries, likewise, each for its share of the heads
    Index light_dim_head = 64;
    Index light_heads = 8;
    Index light_window_size = 128;  ///< a token sees half of it to either side
    Index heavy_dim_head = 64;
    Index heavy_heads = 8;
    bool router_straight_through = true;
    RouterType router_type = RouterType::coor_descent;
    RouterKwargs router_kwargs{};
    MaskedRows masked_rows = MaskedRows::zero;
    bool attends_to_padding = false;  ///< of the light branch, see LocalAttention; as the reference does without a mask
    bool has_light_attn = true;       ///< false: the heavy branch alone
    bool use_null_kv = false;         ///< a learned key and value that every query of the heavy branch sees
    bool use_null_q_tokens = false;   ///< a learned output of the heavy branch for tokens that are no query of it
    bool masked_tokens_get_null_q = false;   ///< masked tokens get that output, too, as in version 0.11
    bool multiply_keys_by_score = false;     ///< keys are multiplied by their scores, as values always are
    bool multiply_queries_by_score = false;  ///< so are queries; the heavy branch's output is in any case
    /// T5's relative position bias: a learned table (num_buckets, heads) for each branch, added to its logits by the
    /// distance between key and query in the sequence.
    bool use_relative_position_bias = false;
    Index relative_position_num_buckets = 32;
    Index relative_position_max_distance = 128;  ///< from here on all distances share a bucket
    bool rotary_emb = false;        ///< queries and keys of the heavy branch are rotated by their tokens' positions
    bool light_rotary_emb = false;  ///< those of the light branch are; the reference has none there
    /// Light attention within windows of light_window_size consecutive tokens, behind an RMSNorm, as in the reference's
    /// image attention. Lengths must be multiples of the window. Otherwise the window slides.
    bool light_in_windows = false;
};

/// Of ConditionalRoutedAutoregressiveAttention. Its router is that of coordinate descent.
struct AutoregressiveAttentionConfig {
    Index dim;
    Index num_heavy_tokens_q;   ///< of each window
    Index num_heavy_tokens_kv;  ///< of all tokens before a window
    Index num_routed_kv = 1;
    Index light_dim_head = 64;
    Index light_heads = 8;
    Index light_window_size = 128;  ///< a token sees the window before its own, and its own up to itself
    Index heavy_window_size = 0;    ///< 0: light_window_size
    Index heavy_dim_head = 64;
    Index heavy_heads = 8;
    bool router_straight_through = true;
    RouterKwargs router_kwargs{};
    bool use_null_q_tokens = false;  ///< a learned output of the heavy branch for tokens that are no query of it
    bool rotary_emb = false;         ///< queries and keys of the heavy branch are rotated by their tokens' positions
};

/// What a router of image attention chooses from.
enum class RoutingScope {
    map,     ///< all tokens of a map: the heavy branch attends across it
    window,  ///< the tokens of each window, as the reference: each window is a sequence of its own
};

struct ImageAttentionConfig {
    Index dim;
    Index num_heavy_tokens_q;
    Index num_heavy_tokens_kv;
    Index num_routed_kv = 1;
    Index num_routed_q = 1;
    Index light_dim_head = 64;
    Index light_heads = 8;
    Index light_window_size = 128;  ///< side of a window: a token sees light_window_size² tokens
    Index heavy_dim_head = 64;
    Index heavy_heads = 8;
    bool router_straight_through = true;
    RouterType router_type = RouterType::coor_descent;
    RouterKwargs router_kwargs{};
    bool channel_first = false;  ///< maps (b, d, h, w) instead of (b, h, w, d)
    RoutingScope routing_scope = RoutingScope::map;
    bool use_null_kv = false;  ///< these as in AttentionConfig
    bool use_null_q_tokens = false;
    bool masked_tokens_get_null_q = false;
    bool multiply_keys_by_score = false;
    bool multiply_queries_by_score = false;
};

/// Of ConditionalRoutedViT. Images may have any size that is a multiple of the patch: the reference's image_size, which
/// only checks that, is left out.
struct ViTConfig {
    Index patch_size;  ///< side, in pixels
    Index num_classes;
    Index dim;  ///< a multiple of 4, at least 8
    Index depth;
    Index attn_num_heavy_tokens_q;
    Index attn_num_heavy_tokens_kv;
    Index attn_heavy_dim_head = 64;
    Index attn_heavy_heads = 8;
    Index attn_light_dim_head = 64;
    Index attn_light_heads = 8;
    Index attn_light_window_size;  ///< side of a window, in patches
    Index ff_num_heavy_tokens;
    double ff_heavy_mult = 4;
    double ff_light_mult = 0.5;
    Index channels = 3;
    bool router_straight_through = true;
    RouterType router_type = RouterType::coor_descent;
    RouterKwargs router_kwargs{};
    Index attn_num_routed_kv = 1;
    Index attn_num_routed_q = 1;
    RoutingScope routing_scope = RoutingScope::map;  ///< of the attention; the feedforward routes over the map
    bool use_null_kv = false;                        ///< these as in AttentionConfig
    bool use_null_q_tokens = false;
};

struct CrossAttentionConfig {
    Index dim;
    Index num_tokens_q;
    Index num_tokens_kv;
    Index dim_head = 64;
    Index heads = 8;
    bool router_straight_through = true;
    RouterType router_type = RouterType::coor_descent;
    RouterKwargs router_kwargs{};
    Index kv_routing_tokens = 1;
    Index q_routing_tokens = 1;
    Index route_block_size = 0;  ///< the context is routed in blocks of so many tokens; 0: as router_kwargs say
    /// The routing tokens of the context first attend to the queries; heads and dim_head as those of the heavy
    /// attention. Needs a LinearRouter, which may route in blocks.
    bool condition_kv_routing_on_queries = false;
    bool use_null_kv = false;        ///< a learned key and value that every query of the heavy branch sees
    bool use_null_q_tokens = false;  ///< a learned output of the heavy branch for tokens that are no query of it
    bool masked_tokens_get_null_q = false;
    bool multiply_keys_by_score = false;  ///< keys are multiplied by their scores, as values always are
    /// T5's relative position bias: a learned table (num_buckets, heads), added to the logits by the position of the
    /// key in the context minus that of the query.
    bool use_relative_position_bias = false;
    Index relative_position_num_buckets = 32;
    Index relative_position_max_distance = 128;  ///< from here on all distances share a bucket
};

struct TransformerBlockConfig {
    Index dim;
    Index num_heavy_attn_tokens_q;
    Index num_heavy_attn_tokens_kv;
    Index num_routed_kv = 1;
    Index num_routed_q = 1;
    Index num_heavy_ff_tokens;
    Index light_dim_head = 64;
    Index light_heads = 8;
    Index light_window_size = 128;
    Index heavy_dim_head = 64;
    Index heavy_heads = 8;
    FeedForwardType feed_forward = FeedForwardType::plain;
    double light_ff_mult = 0.5;
    double heavy_ff_mult = 4;
    bool router_straight_through = true;
    RouterType router_type = RouterType::coor_descent;
    RouterKwargs router_kwargs{};
    MaskedRows masked_rows = MaskedRows::zero;
    bool attends_to_padding = false;
    bool has_light_attn = true;
    bool use_null_kv = false;  ///< these as in AttentionConfig
    bool use_null_q_tokens = false;
    bool masked_tokens_get_null_q = false;
    bool multiply_keys_by_score = false;
    bool multiply_queries_by_score = false;
    bool use_relative_position_bias = false;
    Index relative_position_num_buckets = 32;
    Index relative_position_max_distance = 128;
    bool rotary_emb = false;
    bool light_rotary_emb = false;
    /// In training, this share of the outputs of attention and of feedforward is 0 and the others are multiplied by
    /// 1 / (1 − dropout), before the residual is added.
    double dropout = 0;
};

namespace detail {
/// Whether T5's relative position bias may have so many buckets, and so far a distance.
constexpr bool are_buckets(Index num_buckets, Index max_distance) {
    return num_buckets >= 4 && num_buckets % 2 == 0 && max_distance > num_buckets / 4 && max_distance <= Index{1} << 20;
}
/// Of a configuration with the fields of the relative position bias.
template <typename Config>
constexpr RelativePositionBuckets buckets_of(const Config& config) {
    return {config.relative_position_num_buckets, config.relative_position_max_distance};
}
}  // namespace detail

/// How many tokens one call routes; what is not given comes from the configuration.
struct RoutedCounts {
    std::optional<Index> num_heavy_tokens{};
};
using FeedForwardCounts = RoutedCounts;
struct AttentionCounts {
    std::optional<Index> num_heavy_tokens_q{}, num_heavy_tokens_kv{};
};
struct CrossAttentionCounts {
    std::optional<Index> num_tokens_q{}, num_tokens_kv{};
};
struct TransformerBlockCounts {
    std::optional<Index> num_heavy_attn_tokens_q{}, num_heavy_attn_tokens_kv{}, num_heavy_ff_tokens{};
};

}  // namespace colt5
