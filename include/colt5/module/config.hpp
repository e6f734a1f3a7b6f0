// SPDX-License-Identifier: MIT
#pragma once

#include <optional>

#include <colt5/core/tensor.hpp>
#include <colt5/op/local_attention.hpp>
#include <colt5/router/routers.hpp>

/// Configurations of the modules: the reference's constructor arguments under the reference's names, known at compile
/// time.
namespace colt5 {

struct FeedForwardConfig {
    Index dim;
    Index num_heavy_tokens;
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
    Index light_dim_head = 64;
    Index light_heads = 8;
    Index light_window_size = 128;  ///< a token sees half of it to either side
    Index heavy_dim_head = 64;
    Index heavy_heads = 8;
    bool router_straight_through = true;
    RouterType router_type = RouterType::coor_descent;
    RouterKwargs router_kwargs{};
    MaskedRows masked_rows = MaskedRows::zero;
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
};

struct TransformerBlockConfig {
    Index dim;
    Index num_heavy_attn_tokens_q;
    Index num_heavy_attn_tokens_kv;
    Index num_routed_kv = 1;
    Index num_heavy_ff_tokens;
    Index light_dim_head = 64;
    Index light_heads = 8;
    Index light_window_size = 128;
    Index heavy_dim_head = 64;
    Index heavy_heads = 8;
    double light_ff_mult = 0.5;
    double heavy_ff_mult = 4;
    bool router_straight_through = true;
    RouterType router_type = RouterType::coor_descent;
    RouterKwargs router_kwargs{};
    MaskedRows masked_rows = MaskedRows::zero;
};

/// Numbers of tokens for one call; what is not given comes from the configuration.
struct FeedForwardTokens {
    std::optional<Index> num_heavy_tokens{};
};
struct AttentionTokens {
    std::optional<Index> num_heavy_tokens_q{}, num_heavy_tokens_kv{};
};
struct CrossAttentionTokens {
    std::optional<Index> num_tokens_q{}, num_tokens_kv{};
};
struct TransformerBlockTokens {
    std::optional<Index> num_heavy_attn_tokens_q{}, num_heavy_attn_tokens_kv{}, num_heavy_ff_tokens{};
};

/// What a module adds to its output: nothing, or the tokens that it was given.
enum class Residual { none, tokens };

namespace detail {

/// The number of tokens of one call; throws ValueError below 1.
inline Index token_count(const char* argument, std::optional<Index> given, Index configured) {
    const Index count = given.value_or(configured);
    expect_value(count >= 1, argument, ">= 1", count);
    return count;
}

/// What `residual` stands for: the tokens or the gradient of the output, or an absent view.
template <Viewable T>
auto residual_of(Residual residual, const T& t) {
    return residual == Residual::tokens ? t.const_view() : decltype(t.const_view())();
}

/// `tokens` (b, n, dim) with static dim, in the memory of policy P, `mask` (b, n) or absent.
template <typename Tokens, typename P, typename X>
Tokens expect_tokens(const char* argument, const X& tokens, const char* mask_argument, Mask mask) {
    const auto x = expect<Tokens, P>(argument, tokens);
    expect_value(mask || mask.size() == 0, mask_argument, "a view of data", "null");
    if (mask) expect_shape(mask_argument, mask.shape(), {x.extent(0), x.extent(1)});
    expect_length(argument, x.extent(1));
    return x;
}

/// The same for tokens that a pass keeps a view of.
template <typename Tokens, typename P, typename X>
Tokens expect_kept_tokens(const char* argument, X&& tokens, const char* mask_argument, Mask mask) {
    static_assert(outlives_call<X>,
                  "colt5: a pass reads its tokens again: give the tensor a name, a temporary is gone by then");
    return expect_tokens<Tokens, P>(argument, tokens, mask_argument, mask);
}

}  // namespace detail

}  // namespace colt5
