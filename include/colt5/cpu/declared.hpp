// SPDX-License-Identifier: MIT
#pragma once

// Written by tests/kernels/lists.py from the headers of cpu/: `./dev format` brings it up to date.

/// Declares the kernels of the policy Cpu, which another translation unit instantiates (see kernels.hpp).

#include <colt5/core/norm.hpp>
#include <colt5/cpu/declared_of_logits.hpp>
#include <colt5/cpu/traits.hpp>
#include <colt5/expr/assign.hpp>
#include <colt5/op/adamw.hpp>
#include <colt5/op/append_keys.hpp>
#include <colt5/op/clean_padding.hpp>
#include <colt5/op/copy_sequences.hpp>
#include <colt5/op/copy_tokens.hpp>
#include <colt5/op/dense_attention.hpp>
#include <colt5/op/dropout.hpp>
#include <colt5/op/embedding.hpp>
#include <colt5/op/feed_forward.hpp>
#include <colt5/op/gather.hpp>
#include <colt5/op/gathered_attention.hpp>
#include <colt5/op/global_norm.hpp>
#include <colt5/op/layer_norm.hpp>
#include <colt5/op/linear.hpp>
#include <colt5/op/local_attention.hpp>
#include <colt5/op/look_back.hpp>
#include <colt5/op/map_tokens.hpp>
#include <colt5/op/norm_linear.hpp>
#include <colt5/op/null_key.hpp>
#include <colt5/op/null_query.hpp>
#include <colt5/op/projected_local_attention.hpp>
#include <colt5/op/relative_position_bias.hpp>
#include <colt5/op/rms_norm.hpp>
#include <colt5/op/rotary.hpp>
#include <colt5/op/route_blocks.hpp>
#include <colt5/op/route_logits.hpp>
#include <colt5/op/swap_first_axes.hpp>
#include <colt5/op/windows.hpp>
#include <colt5/op/zero.hpp>

namespace colt5 {

// adamw.hpp
template <typename T>
void adamw_kernel(const Cpu& policy, VectorView<T> parameter, VectorView<accumulate_t<T>> master,
                  VectorView<const accumulate_t<T>> gradient, VectorView<accumulate_t<T>> mean,
                  VectorView<accumulate_t<T>> square, const AdamWCoefficients& c);

// append_keys.hpp
template <typename T>
void append_keys_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> to_kv, TokensView<T> to_scale,
                        TokensView<TokenIndex> to_positions, MatrixView<TokenIndex> counts,
                        View<const T, dynamic, dynamic, dynamic, dynamic> kv, TokensView<const T> value_scale,
                        TokensView<const TokenIndex> positions, TokensView<const bool> live);

// clean_padding.hpp
template <typename T>
bool padding_is_finite_kernel(const Cpu& policy, TokensView<const T> x, Mask mask);

// copy_sequences.hpp
template <typename T>
void gather_sequences_kernel(const Cpu& policy, TokensView<T> out, MatrixView<const T> all,
                             std::span<const Index> firsts);
template <typename T>
void scatter_sequences_kernel(const Cpu& policy, MatrixView<T> all, TokensView<const T> x,
                              std::span<const Index> firsts);

// copy_tokens.hpp
template <typename T>
void copy_tokens_kernel(const Cpu& policy, TokensView<T> to, Index to_first, TokensView<const T> from, Index from_first,
                        Index count);

// dense_attention.hpp
template <typename T, typename Bias>
void dense_attention_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> out,
                            TokensView<T> log_sum_exp, View<const T, dynamic, dynamic, dynamic, dynamic> q,
                            View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv, KeyMask mask,
                            TokensView<const T> value_scale, const Bias& bias);
template <typename T, typename Bias, typename DTable>
void dense_attention_vjp_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> d_q,
                                View<T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_kv,
                                TokensView<T> d_value_scale, View<const T, dynamic, dynamic, dynamic, dynamic> d_out,
                                View<const T, dynamic, dynamic, dynamic, dynamic> out, TokensView<const T> log_sum_exp,
                                View<const T, dynamic, dynamic, dynamic, dynamic> q,
                                View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv, KeyMask mask,
                                TokensView<const T> value_scale, const Bias& bias, const DTable& d_table);

// dropout.hpp
template <typename T>
void dropout_kernel(const Cpu& policy, TokensView<T> out, TokensView<const T> x, TokensView<const T> residual,
                    Mask mask, const DropoutMask& drop);

// embedding.hpp
template <typename T>
void embedding_kernel(const Cpu& policy, MatrixView<T> out, MatrixView<const T> weight,
                      VectorView<const TokenIndex> ids);
template <typename T>
void embedding_vjp_kernel(const Cpu& policy, MatrixView<T> d_weight, MatrixView<const T> d_out,
                          VectorView<const TokenIndex> ids);

// feed_forward.hpp
template <typename T>
void feed_forward_kernel(const Cpu& policy, TokensView<T> y, TokensView<T> pre_activation, TokensView<const T> x,
                         const FeedForwardParameters<const T>& parameters, TokensView<const T> add);
template <typename T>
void feed_forward_vjp_kernel(const Cpu& policy, TokensView<T> d_x, const FeedForwardParameters<T>& gradients,
                             TokensView<const T> d_y, TokensView<const T> x, TokensView<const T> pre_activation,
                             const FeedForwardParameters<const T>& parameters,
                             const GradientEpilogue<T, Cpu>& epilogue);

// gather.hpp
template <typename T>
void gather_kernel(const Cpu& policy, TokensView<T> out, TokensView<const T> x, MatrixView<const TokenIndex> indices);
template <typename T>
void scatter_mean_weights_kernel(const Cpu& policy, TokensView<T> rows, MatrixView<const TokenIndex> indices);
template <typename T>
void scatter_kernel(const Cpu& policy, Scatter how, TokensView<T> out, TokensView<const T> rows,
                    MatrixView<const TokenIndex> indices, MatrixView<const T> scale);

// gathered_attention.hpp
template <typename T>
void gathered_attention_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> out,
                               TokensView<T> log_sum_exp, View<const T, dynamic, dynamic, dynamic, dynamic> q,
                               View<const T, dynamic, dynamic, dynamic, dynamic> kv,
                               TokensView<const TokenIndex> indices, KeyMask mask, TokensView<const T> value_scale);
template <typename T>
void gathered_attention_vjp_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> d_q,
                                   View<T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_kv,
                                   TokensView<T> d_value_scale, View<const T, dynamic, dynamic, dynamic, dynamic> d_out,
                                   View<const T, dynamic, dynamic, dynamic, dynamic> out,
                                   TokensView<const T> log_sum_exp, View<const T, dynamic, dynamic, dynamic, dynamic> q,
                                   View<const T, dynamic, dynamic, dynamic, dynamic> kv,
                                   TokensView<const TokenIndex> indices, KeyMask mask, TokensView<const T> value_scale);

// global_norm.hpp
template <typename T>
double sum_of_squares_kernel(const Cpu& policy, VectorView<const T> x, double scale);

// layer_norm.hpp
template <typename T>
void layer_norm_kernel(const Cpu& policy, MatrixView<T> y, MatrixView<const T> x,
                       const LayerNormParameters<const T>& norm);
template <typename T>
void layer_norm_vjp_kernel(const Cpu& policy, TokensView<T> d_x, const LayerNormParameters<T>& d_norm,
                           TokensView<const T> d_y, TokensView<const T> x, const LayerNormParameters<const T>& norm,
                           const GradientEpilogue<T, Cpu>& epilogue);

// linear.hpp
template <typename T>
void linear_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> y,
                   View<const T, dynamic, dynamic, dynamic, dynamic> x, MatrixView<const T> weight,
                   VectorView<const T> bias);
template <typename T>
void linear_add_kernel(const Cpu& policy, TokensView<T> y, TokensView<const T> x, MatrixView<const T> weight,
                       VectorView<const T> bias, TokensView<const T> add);
template <typename T>
void linear_vjp_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> d_x, MatrixView<T> d_weight,
                       VectorView<T> d_bias, View<const T, dynamic, dynamic, dynamic, dynamic> d_y,
                       View<const T, dynamic, dynamic, dynamic, dynamic> x, MatrixView<const T> weight);

// local_attention.hpp
template <typename T, typename Bias>
void local_attention_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> out,
                            TokensView<T> log_sum_exp, View<const T, dynamic, dynamic, dynamic, dynamic> q,
                            View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> kv, Mask mask, Index first,
                            const LocalAttention& attention, const Bias& bias);
template <typename T, typename Bias, typename DTable>
void local_attention_vjp_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic> d_qkv,
                                View<const T, dynamic, dynamic, dynamic, dynamic> d_out,
                                View<const T, dynamic, dynamic, dynamic, dynamic> out, TokensView<const T> log_sum_exp,
                                View<const T, dynamic, dynamic, dynamic, dynamic> q,
                                View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> kv, Mask mask, Index first,
                                Index carried, const LocalAttention& attention, const Bias& bias,
                                const DTable& d_table);

// look_back.hpp
template <typename T>
void look_back_kernel(const Cpu& policy, TokensView<T> rows, TokensView<const T> x, Index window);
template <typename T>
void look_back_vjp_kernel(const Cpu& policy, TokensView<T> d_x, TokensView<const T> d_rows, Index window);

// map_tokens.hpp
template <typename T>
void add_sincos_positions_kernel(const Cpu& policy, TokensView<T> tokens, const WindowGrid& grid);
template <typename T>
void map_mean_kernel(const Cpu& policy, TokensView<T> mean, TokensView<const T> tokens, const WindowGrid& grid);
template <typename T>
void map_mean_vjp_kernel(const Cpu& policy, TokensView<T> d_tokens, TokensView<const T> d_mean, const WindowGrid& grid);

// norm_linear.hpp
template <typename T, std::size_t Count, typename Norm>
void norm_linear_kernel(const Cpu& policy, const std::array<Projection<T>, Count>& projections, TokensView<const T> x,
                        const Norm& norm);
template <typename T, typename Norm, typename NormGradients>
void norm_linear_vjp_kernel(const Cpu& policy, TokensView<T> d_x, const NormGradients& d_norm, MatrixView<T> d_weight,
                            VectorView<T> d_bias, TokensView<const T> d_y, TokensView<const T> x, const Norm& norm,
                            MatrixView<const T> weight, const GradientEpilogue<T, Cpu>& epilogue);

// null_key.hpp
template <typename T>
void with_null_key_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> out,
                          View<bool, dynamic, dynamic, dynamic> out_mask, TokensView<T> out_scale,
                          View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv,
                          TokensView<const T> null_kv, KeyMask mask, TokensView<const T> value_scale);
template <typename T>
void null_key_vjp_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_kv,
                         TokensView<T> d_scale,
                         View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_out,
                         TokensView<const T> d_out_scale);
template <typename T>
void null_key_gradient_kernel(const Cpu&, TokensView<T> d_null_kv,
                              View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_out);

// null_query.hpp
template <typename T>
void null_query_vjp_kernel(const Cpu& policy, VectorView<T> d_null_token, TokensView<const T> d_out, Mask unrouted);

// projected_local_attention.hpp
template <typename T, typename Bias, typename DTable>
void projected_local_attention_vjp_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic> d_qkv,
                                          MatrixView<T> d_weight, TokensView<const T> d_y,
                                          View<const T, dynamic, dynamic, dynamic, dynamic> q,
                                          View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> kv, Mask mask,
                                          Index first, Index carried, const LocalAttention& attention,
                                          MatrixView<const T> weight, const Bias& bias, const DTable& d_table);

// relative_position_bias.hpp
template <typename T>
void relative_position_bias_kernel(const Cpu&, MatrixView<T> by_distance, MatrixView<const T> table,
                                   const RelativePositionBuckets& buckets);

// rms_norm.hpp
template <typename T>
void rms_norm_kernel(const Cpu& policy, MatrixView<T> y, MatrixView<const T> x, const RMSNormParameters<const T>& norm);
template <typename T>
void rms_norm_vjp_kernel(const Cpu& policy, TokensView<T> d_x, const RMSNormParameters<T>& d_norm,
                         TokensView<const T> d_y, TokensView<const T> x, const RMSNormParameters<const T>& norm,
                         const GradientEpilogue<T, Cpu>& epilogue);

// rotary.hpp
template <typename T>
void rotary_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic> x, Index heads,
                   VectorView<const float> inv_freq, const RowPositions& at, bool back);

// route_blocks.hpp
template <typename T>
void merge_block_rows_kernel(const Cpu&, const RouteBlocks& blocks, TokensView<T> merged, TokensView<const T> x);
template <typename T>
void pad_sequences_kernel(const Cpu&, TokensView<T> padded, TokensView<const T> x, Index length);

// route_logits.hpp
template <typename T>
void route_logits_kernel(const Cpu& policy, TokensView<T> logits, TokensView<const T> x, MatrixView<const T> token,
                         T scale);
template <typename T>
void route_logits_vjp_kernel(const Cpu& policy, TokensView<T> d_x, MatrixView<T> d_token, TokensView<const T> d_logits,
                             TokensView<const T> x, MatrixView<const T> token, T scale);
template <typename T>
void cosine_logits_kernel(const Cpu& policy, TokensView<T> logits, MatrixView<T> norms, TokensView<const T> x,
                          MatrixView<const T> token, VectorView<const T> token_norms, T scale);
template <typename T>
void cosine_logits_vjp_kernel(const Cpu& policy, TokensView<T> d_x, MatrixView<T> d_token, TokensView<const T> d_logits,
                              TokensView<const T> logits, MatrixView<const T> norms, TokensView<const T> x,
                              MatrixView<const T> token, VectorView<const T> token_norms, T scale);

// swap_first_axes.hpp
template <typename T>
void swap_first_axes_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> y,
                            View<const T, dynamic, dynamic, dynamic, dynamic> x);

// windows.hpp
template <typename T>
void windows_kernel(const Cpu& policy, TokensView<T> tokens, MapView<const T> maps, const WindowGrid& grid,
                    bool channel_first);
template <typename T>
void windows_kernel(const Cpu& policy, MapView<T> maps, TokensView<const T> tokens, const WindowGrid& grid,
                    bool channel_first);

// zero.hpp
template <typename T>
void zero_kernel(const Cpu& policy, VectorView<T> x);

}  // namespace colt5
