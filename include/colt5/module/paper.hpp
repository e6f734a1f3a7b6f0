// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/module/config.hpp>

/// The blocks of the CoLT5 paper (Ainslie et al. 2023) as configurations of ConditionalRoutedTransformerBlock.
///
/// <colt5/colt5.hpp> does not include this header: a program with a name `config` of its own and `using namespace
/// colt5` would have two.
namespace colt5::config {

/// How many tokens the paper routes in a sequence of `length`, to be given to a call: n/16 queries, n/8 keys and
/// values, and n/16 tokens of the feedforward; rounded down, and at least 1.
///
///     block(tokens, mask, config::colt5_tokens(tokens.extent(1)))
constexpr TransformerBlockCounts colt5_tokens(Index length) {
    const Index sixteenth = std::max(Index{1}, length / 16), eighth = std::max(Index{1}, length / 8);
    return {.num_heavy_attn_tokens_q = sixteenth, .num_heavy_attn_tokens_kv = eighth, .num_heavy_ff_tokens = sixteenth};
}

/// A configuration that routes by default as many tokens as the paper in a sequence of `length`.
constexpr TransformerBlockConfig for_length(TransformerBlockConfig block, Index length) {
    const TransformerBlockCounts tokens = colt5_tokens(length);
    block.num_heavy_attn_tokens_q = *tokens.num_heavy_attn_tokens_q;
    block.num_heavy_attn_tokens_kv = *tokens.num_heavy_attn_tokens_kv;
    block.num_heavy_ff_tokens = *tokens.num_heavy_ff_tokens;
    return block;
}

/// The block of the paper at a size. What differs from the default, which is the package's form:
///
/// | | paper, here | package 0.2.3 |
/// |---|---|---|
/// | light attention sees | 127 tokens to either side | 64 |
/// | light and heavy heads | by size | 8 and 8 |
/// | routed tokens | n/16 queries, n/8 keys and values, n/16 of the feedforward | constants |
/// | scores | multiply: the descent's, between 0 and 1 | are 1, and pass gradients (straight-through) |
/// | scores of keys and values | multiply the normed inputs of both | multiply values |
/// | feedforward | gated, GELU in its tanh form, no biases | GELU with erf, biases |
/// | positions | T5's relative bias, 32 buckets up to distance 128 | none |
///
/// The maps to keys and values have no bias: a score that multiplies their input multiplies keys and values, which is
/// multiply_keys_by_score. Paper and package both have three independent routers with 50 steps of the descent at ε 1,
/// and feedforwards of d/2 and 4 d.
///
/// Where this library stays with the package, not the paper's T5: each branch has a norm of its own, LayerNorm in the
/// light attention, and routers see the tokens before it; logits are scaled by 1/√64; each block has tables of its own
/// of the relative bias; weights are drawn as PyTorch draws them; there is no dropout unless the field is set. The
/// paper's decoder, whose cross attention is not routed, is in EncoderDecoder.
///
/// As they stand, these blocks give their routers no gradient at the initial weights, see docs/training.md. To train
/// routers, set router_kwargs.coor_descent.score_scale to 1/√dim, and iterate_to_convergence.
constexpr TransformerBlockConfig paper_block(Index dim, Index light_heads, Index heavy_heads, Index length = 16384) {
    return for_length({.dim = dim,
                       .num_heavy_attn_tokens_q = 1,
                       .num_heavy_attn_tokens_kv = 1,
                       .num_heavy_ff_tokens = 1,
                       .light_dim_head = 64,
                       .light_heads = light_heads,
                       .light_window_size = 2 * 127,
                       .heavy_dim_head = 64,
                       .heavy_heads = heavy_heads,
                       .feed_forward = FeedForwardType::gated,
                       .light_ff_mult = 0.5,
                       .heavy_ff_mult = 4,
                       .router_straight_through = false,
                       .router_type = RouterType::coor_descent,
                       .router_kwargs = {.coor_descent = {.n_iters = 50, .eps = 1}},
                       .multiply_keys_by_score = true,
                       .use_relative_position_bias = true,
                       .relative_position_num_buckets = 32,
                       .relative_position_max_distance = 128},
                      length);
}

/// The paper's sizes, for sequences of 16,384 tokens; see paper_block. For others, for_length at compile time, or
/// colt5_tokens for one call.
inline constexpr TransformerBlockConfig colt5_base = paper_block(768, 4, 8), colt5_large = paper_block(1024, 4, 12),
                                        colt5_xl = paper_block(2048, 8, 24);

}  // namespace colt5::config
