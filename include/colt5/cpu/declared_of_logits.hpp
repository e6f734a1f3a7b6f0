// SPDX-License-Identifier: MIT
#pragma once

// Written by tests/kernels/lists.py from the headers of cpu/: `./dev format` brings it up to date.

/// Declares the kernels of logits of the policy Cpu, which another translation unit instantiates (see kernels.hpp).

#include <colt5/cpu/policy.hpp>
#include <colt5/op/causal_key_counts.hpp>
#include <colt5/op/causal_top_k.hpp>
#include <colt5/op/causal_top_k_next.hpp>
#include <colt5/op/coordinate_descent.hpp>
#include <colt5/op/cumulative_softmax.hpp>
#include <colt5/op/gather.hpp>
#include <colt5/op/global_norm.hpp>
#include <colt5/op/look_back.hpp>
#include <colt5/op/null_query.hpp>
#include <colt5/op/relative_position_bias.hpp>
#include <colt5/op/route_blocks.hpp>
#include <colt5/op/sinkhorn.hpp>
#include <colt5/op/top_k.hpp>
#include <colt5/op/windows.hpp>

namespace colt5 {

// causal_key_counts.hpp
template <std::same_as<TokenIndex> Integer>
void causal_key_counts_kernel(const Cpu& policy, TokensView<Integer> counts, const PickedPositions& queries,
                              const PickedPositions& keys, Index null_keys);

// causal_top_k.hpp
template <typename T>
void causal_top_k_kernel(const Cpu& policy, const CausalTopK& how, const CausalBlocks& blocks,
                         TokensView<TokenIndex> indices, TokensView<T> scores, TokensView<T> slopes,
                         TokensView<bool> live, TokensView<const T> logits, Mask mask);

// causal_top_k_next.hpp
template <typename T>
void causal_top_k_next_kernel(const Cpu& policy, const CausalTopK& how, NextCausalPicks<T, Cpu>* next,
                              TokensView<T> history, TokensView<T> block, TokensView<std::int64_t> progress,
                              TokensView<const T> logits, Mask mask);

// coordinate_descent.hpp
template <typename T>
void coordinate_descent_kernel(const Cpu& policy, TokensView<T> scores, TokensView<T> threshold,
                               TokensView<T> saturated, TokensView<const T> logits, Mask mask, DescentK k,
                               const CoordinateDescent& descent);
template <typename T>
void coordinate_descent_vjp_kernel(const Cpu& policy, TokensView<T> d_logits, MatrixView<T> d_k,
                                   TokensView<const T> d_scores, TokensView<const T> scores,
                                   TokensView<const T> threshold, TokensView<const T> saturated,
                                   TokensView<const T> logits, Mask mask, DescentK k, const CoordinateDescent& descent);

// cumulative_softmax.hpp
template <typename T>
void cumulative_softmax_kernel(const Cpu& policy, TokensView<T> scores, TokensView<const T> logits,
                               TokensView<const TokenIndex> indices, Mask mask, double temperature);
template <typename T>
void cumulative_softmax_vjp_kernel(const Cpu& policy, TokensView<T> d_logits, TokensView<const T> d_scores,
                                   TokensView<const T> logits, TokensView<const TokenIndex> indices, Mask mask,
                                   double temperature);

// gather.hpp
template <std::same_as<bool> Bool>
void gather_mask_kernel(const Cpu&, TokensView<Bool> out, Mask mask, TokensView<const TokenIndex> indices);
template <typename T>
void pick_scores_kernel(const Cpu&, TokensView<T> out, TokensView<const T> scores, TokensView<const TokenIndex> indices,
                        Mask mask);
template <typename T>
void straight_through_scores_kernel(const Cpu&, TokensView<T> scores, TokensView<const T> logits,
                                    TokensView<const TokenIndex> indices, Mask mask);
template <typename T>
void place_scores_kernel(const Cpu&, TokensView<T> d_scores, TokensView<const T> d_picked,
                         TokensView<const TokenIndex> indices, Mask mask);
template <typename T>
void short_rows_kernel(const Cpu&, TokensView<T> values, TokensView<const TokenIndex> indices, Mask mask,
                       SampleCount k);

// global_norm.hpp
template <typename T>
void scale_kernel(const Cpu& policy, VectorView<T> x, double factor);

// look_back.hpp
template <std::same_as<TokenIndex> Integer>
void look_back_counts_kernel(const Cpu&, TokensView<Integer> counts, Index windows);
template <typename T>
void window_keys_kernel(const Cpu& policy, TokensView<TokenIndex> indices, TokensView<T> scores, TokensView<bool> mask,
                        TokensView<const TokenIndex> picks, TokensView<const T> pick_scores, Index windows,
                        Index window, Index first, Index null);
template <typename T>
void window_keys_vjp_kernel(const Cpu&, TokensView<T> d, TokensView<const T> d_scores);
template <typename T>
void window_prefixes_kernel(const Cpu& policy, TokensView<T> rows, View<bool, dynamic, dynamic> mask,
                            MatrixView<const T> logits, Index window, Index first);
template <typename T>
void window_prefixes_vjp_kernel(const Cpu& policy, MatrixView<T> d_logits, TokensView<const T> d_rows, Index window,
                                Index first);

// null_query.hpp
template <std::same_as<bool> Bool>
void unrouted_tokens_kernel(const Cpu&, View<Bool, dynamic, dynamic> unrouted, MatrixView<const TokenIndex> indices,
                            Mask mask, Mask live);

// relative_position_bias.hpp
template <typename T>
void relative_position_bias_vjp_kernel(const Cpu& policy, MatrixView<T> d_table, MatrixView<const T> d_by_distance,
                                       const RelativePositionBuckets& buckets);

// route_blocks.hpp
template <std::same_as<TokenIndex> Integer>
void block_shares_kernel(const Cpu&, const RouteBlocks& blocks, VectorView<Integer> lengths,
                         VectorView<TokenIndex> picks, Mask mask);
template <typename T>
void merge_blocks_kernel(const Cpu&, const RouteBlocks& blocks, TokensView<TokenIndex> indices, TokensView<T> scores,
                         TokensView<const TokenIndex> block_indices, TokensView<const T> block_scores,
                         VectorView<const TokenIndex> lengths);
template <typename T>
void split_blocks_kernel(const Cpu&, const RouteBlocks& blocks, TokensView<T> block_scores, TokensView<const T> scores,
                         VectorView<const TokenIndex> lengths);

// sinkhorn.hpp
template <typename T>
void gumbel_noise_kernel(const Cpu& policy, TokensView<T> noise, Random random, GumbelRows which);
template <typename T>
void sinkhorn_kernel(const Cpu& policy, TokensView<TokenIndex> indices, TokensView<T> scores,
                     View<double, dynamic, dynamic, dynamic, dynamic> slot_potential,
                     View<double, dynamic, dynamic, dynamic, dynamic> token_potential, TokensView<const T> logits,
                     TokensView<const T> noise, Mask mask, const Sinkhorn& sinkhorn,
                     VectorView<const TokenIndex> slots_of_sample);
template <typename T>
void sinkhorn_vjp_kernel(const Cpu& policy, TokensView<T> d_logits, TokensView<const T> d_scores,
                         TokensView<const TokenIndex> indices, TokensView<const T> scores,
                         View<const double, dynamic, dynamic, dynamic, dynamic> slot_potential,
                         View<const double, dynamic, dynamic, dynamic, dynamic> token_potential,
                         TokensView<const T> logits, TokensView<const T> noise, Mask mask, const Sinkhorn& sinkhorn,
                         VectorView<const TokenIndex> slots_of_sample);

// top_k.hpp
template <typename T>
void top_k_kernel(const Cpu& policy, TokensView<TokenIndex> indices, TokensView<const T> logits, Mask mask);

// windows.hpp
template <std::same_as<bool> Bool>
void window_mask_kernel(const Cpu& policy, View<Bool, dynamic, dynamic> out, MapMask mask, const WindowGrid& grid);

}  // namespace colt5
