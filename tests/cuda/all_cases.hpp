// SPDX-License-Identifier: MIT
#pragma once

#include "module/autoregressive.hpp"
#include "module/block.hpp"
#include "module/cross_attention.hpp"
#include "module/decode.hpp"
#include "module/encoder_decoder.hpp"
#include "module/image.hpp"
#include "module/language_model.hpp"
#include "module/ragged.hpp"
#include "module/routed.hpp"
#include "module/stack.hpp"
#include "module/training.hpp"
#include "op/cross_entropy.hpp"
#include "op/dense_attention.hpp"
#include "op/dropout.hpp"
#include "op/expressions.hpp"
#include "op/feed_forward.hpp"
#include "op/gather.hpp"
#include "op/linear.hpp"
#include "op/local_attention.hpp"
#include "op/many_sequences.hpp"
#include "op/norms.hpp"
#include "op/null_tokens.hpp"
#include "op/rotary.hpp"
#include "op/routing.hpp"
#include "op/sinkhorn.hpp"

/// The list of all cases. Each is a function of a policy P, whose kernels are included before this file, and of a
/// scalar type T: that of the setting's precision on the GPU, double on the CPU.
namespace cases {

/// All cases in T, for policies that `make_policy(setting)` gives.
template <typename T, typename MakePolicy>
std::vector<Case> all_cases(MakePolicy make_policy) {
    using P = decltype(make_policy(Setting()));
    std::vector<Case> all;
    const auto add = [&](const char* name, Results (*body)(const P&, const Setting&), std::uint64_t seeds = 6,
                         bool is_of_modules = false) {
        all.push_back(
            {name, seeds, is_of_modules, [=](const Setting& setting) { return body(make_policy(setting), setting); }});
    };
    const auto add_of_modules = [&](const char* name, Results (*body)(const P&, const Setting&)) {
        add(name, body, 6, true);
    };
    add("linear", linear_case<T, P>);
    add("norms", norms_case<T, P>);
    add("feedforward", feed_forward_case<T, P>);
#if !defined(CASES_WITHOUT_OWN_EXPRESSIONS)
    add("expressions", expressions_case<T, P>);
#endif
    add("cross-entropy", cross_entropy_case<T, P>);
    add("embedding", embedding_case<T, P>);
    add("embedding of many tokens", long_embedding_case<T, P>, 4);
    add("dropout", dropout_case<T, P>);
    add("gather", gather_case<T, P>);
    add("routing", routing_case<T, P>);
    add("causal routing", causal_case<T, P>);
    add("causal routing of next tokens", next_causal_case<T, P>);
    add("long rows", long_rows_case<T, P>, 3);
    add("sinkhorn", sinkhorn_case<T, P>);
    add("local attention", local_attention_case<T, P>);
    add("local attention of many heads", many_heads_case<T, P>, 3);
    add("local attention of heads of 64", heads_of_64_case<T, P>, 8);
    add("dense attention", dense_attention_case<T, P>);
    add("local attention with a bias", local_bias_case<T, P>, 12);
    add("local attention with a bias, of many heads", local_bias_of_many_heads_case<T, P>, 3);
    add("local attention with a bias, of heads of 64", local_bias_of_heads_of_64_case<T, P>, 8);
    add("gathered attention", gathered_attention_case<T, P>);
    add("dense attention with a bias", dense_bias_case<T, P>, 12);
    add("dense attention to the first keys", first_keys_case<T, P>, 12);
    add("null tokens", null_tokens_case<T, P>);
    add("rotary", rotary_case<T, P>);
    add("windows", windows_case<T, P>);
    add("map tokens", map_tokens_case<T, P>);
    add("many sequences", many_sequences_case<T, P>, 1);
    add("look back", look_back_case<T, P>);
    add("optimizer", optimizer_case<T, P>);
    add_of_modules("half a block, coordinate descent", half_block_case<by_descent_of_one_route, T, P>);
    add_of_modules("half a block, cumulative softmax", half_block_case<by_softmax, T, P>);
    add_of_modules("half a block, Sinkhorn", half_block_case<by_sinkhorn, T, P>);
    add_of_modules("half a block in blocks, coordinate descent", half_block_case<by_descent_in_blocks, T, P>);
    add_of_modules("half a block in blocks, cumulative softmax", half_block_case<by_softmax_in_blocks, T, P>);
    add_of_modules("half a block in blocks, Sinkhorn", half_block_case<by_sinkhorn_in_blocks, T, P>);
    add_of_modules("block, coordinate descent", block_case<by_descent, T, P>);
    add_of_modules("block, cumulative softmax", block_case<by_softmax, T, P>);
    add_of_modules("block, Sinkhorn", block_case<by_sinkhorn, T, P>);
    add_of_modules("block, the paper's form", block_case<of_paper, T, P>);
    add_of_modules("gated feedforward", gated_feed_forward_case<T, P>);
    add_of_modules("attention with null tokens", attention_case<attention_with_null_tokens, T, P>);
    add_of_modules("attention with rotary embeddings", attention_case<attention_with_rotary, T, P>);
    add_of_modules("attention with a relative position bias", attention_case<attention_with_bias, T, P>);
    add_of_modules("heavy attention alone", attention_case<heavy_attention_alone, T, P>);
    add_of_modules("attention with routes of queries", attention_case<attention_with_query_routes, T, P>);
    add_of_modules("routes of queries, cumulative softmax", attention_case<query_routes_by_softmax, T, P>);
    add_of_modules("routes of queries, Sinkhorn", attention_case<query_routes_by_sinkhorn, T, P>);
    add_of_modules("routes of queries with a relative position bias", attention_case<query_routes_with_bias, T, P>);
    add_of_modules("causal attention", attention_case<causal_attention, T, P>);
    add_of_modules("causal attention with all options", attention_case<causal_attention_with_all, T, P>);
    add_of_modules("causal block", block_case<causal_block, T, P>);
    add_of_modules("causal block with another future", another_future_case<causal_block, T, P>);
    add_of_modules("autoregressive attention", autoregressive_case<autoregressive, T, P>);
    add_of_modules("autoregressive attention with routes", autoregressive_case<autoregressive_of_routes, T, P>);
    add_of_modules("cross attention", cross_case<cross_config, T, P>);
    add_of_modules("cross attention, cumulative softmax", cross_case<cross_by_softmax, T, P>);
    add_of_modules("cross attention, Sinkhorn", cross_case<cross_by_sinkhorn, T, P>);
    add_of_modules("cross attention with routes of queries", cross_case<cross_with_query_routes, T, P>);
    add_of_modules("cross attention with a relative position bias", cross_case<cross_with_bias, T, P>);
    add_of_modules("cross attention with null tokens", cross_case<cross_with_null_tokens, T, P>);
    add_of_modules("cross attention routed by what the queries ask for", cross_case<cross_conditioned, T, P>);
    add_of_modules("cross attention, context routed in blocks", cross_case<cross_in_blocks, T, P>);
    add_of_modules("cross attention routed in blocks by what the queries ask for",
                   cross_case<cross_conditioned_in_blocks, T, P>);
    add_of_modules("image attention over the map", image_attention_case<over_map, T, P>);
    add_of_modules("image attention over the map, channel first", image_attention_case<over_map_of_channels, T, P>);
    add_of_modules("image attention per window", image_attention_case<per_window, T, P>);
    add_of_modules("image attention over the map, cumulative softmax", image_attention_case<over_map_by_softmax, T, P>);
    add_of_modules("image attention per window, Sinkhorn", image_attention_case<per_window_by_sinkhorn, T, P>);
    add_of_modules("ViT", vit_case<T, P>);
    add_of_modules("expert choice", routed_case<ExpertChoice, T, P>);
    add_of_modules("expert choice, cumulative softmax", routed_case<ExpertChoiceBySoftmax, T, P>);
    add_of_modules("expert choice, Sinkhorn", routed_case<ExpertChoiceBySinkhorn, T, P>);
    add_of_modules("mixture of attention", routed_case<MixtureOfAttention, T, P>);
    add_of_modules("a routed module as the heavy branch", routed_case<RoutedTwice, T, P>);
    add_of_modules("ragged halves of a block", ragged_case<by_descent_of_one_route, T, P>);
    add_of_modules("ragged halves of a block, cumulative softmax", ragged_case<by_softmax, T, P>);
    add_of_modules("ragged halves of the paper's block", ragged_case<of_paper, T, P>);
    add_of_modules("ragged attention with rotary embeddings", ragged_attention_case<attention_with_rotary, T, P>);
    add_of_modules("ragged attention with a relative position bias", ragged_attention_case<attention_with_bias, T, P>);
    add_of_modules("ragged stack", ragged_stack_case<T, P>);
    add_of_modules("ragged cross attention", ragged_cross_case<cross_config, T, P>);
    add_of_modules("ragged cross attention with null tokens", ragged_cross_case<cross_with_null_tokens, T, P>);
    add_of_modules("stack", stack_case<T, P>);
    add_of_modules("head", head_case<T, P>);
    add_of_modules("language model", language_model_case<T, P>);
    add_of_modules("multi-query attention", multi_query_attention_case<T, P>);
    add_of_modules("decoder layer", decoder_layer_case<T, P>);
    add_of_modules("encoder and decoder", encoder_decoder_case<T, P>);
    add_of_modules("decode", decode_case<T, P>);
    add_of_modules("training", training_case<T, P>);
    return all;
}

}  // namespace cases
