// SPDX-License-Identifier: MIT
// expect: colt5: no `adamw` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `add_sincos_positions` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `assign` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `append_keys` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `copy_tokens` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `causal_top_k_next` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `causal_key_counts` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `block_shares` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `causal_top_k` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `coordinate_descent_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `coordinate_descent` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `cosine_logits_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `cosine_logits` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `cumulative_softmax_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `cumulative_softmax` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `gathered_attention_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `gathered_attention` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `dense_attention_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `dense_attention` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `dropout` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `embedding_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `embedding` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `feed_forward_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `feed_forward` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `gather_mask` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `gather` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `gather_sequences` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `gumbel_noise` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `layer_norm_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `layer_norm` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `linear_add` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `linear_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `linear` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `local_attention_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `local_attention` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `merge_block_rows` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `merge_blocks` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `norm_linear_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `look_back` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `look_back_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `window_keys` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `window_keys_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `window_prefixes` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `window_prefixes_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `look_back_counts` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `map_mean` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `map_mean_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `norm_linear` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `null_key_gradient` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `null_key_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `null_query_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `pad_sequences` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `padding_is_finite` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `pick_scores` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `place_scores` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `projected_local_attention_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `relative_position_bias_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `relative_position_bias` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `rms_norm_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `rms_norm` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `rotary` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `route_logits_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `route_logits` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `scale` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `scatter_mean_weights` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `scatter_sequences` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `scatter` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `short_rows` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `sinkhorn_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `sinkhorn` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `split_blocks` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `straight_through_scores` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `sum_of_squares` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `swap_first_axes` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `top_k` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `unrouted_tokens` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `window_mask` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `windows` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `with_null_key` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// expect: colt5: no `zero` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
// first: colt5: no `
// Without the header of a backend no operation compiles, and each says which kernel it lacks.
#include <colt5/cpu/policy.hpp>
#include <colt5/op/adamw.hpp>
#include <colt5/op/append_keys.hpp>
#include <colt5/op/causal_key_counts.hpp>
#include <colt5/op/causal_top_k.hpp>
#include <colt5/op/causal_top_k_next.hpp>
#include <colt5/op/clean_padding.hpp>
#include <colt5/op/coordinate_descent.hpp>
#include <colt5/op/copy_sequences.hpp>
#include <colt5/op/copy_tokens.hpp>
#include <colt5/op/cumulative_softmax.hpp>
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
#include <colt5/op/sinkhorn.hpp>
#include <colt5/op/swap_first_axes.hpp>
#include <colt5/op/top_k.hpp>
#include <colt5/op/windows.hpp>
#include <colt5/op/zero.hpp>
#ifdef COLT5_COMPILE_FAIL_CONTROL
#include <colt5/cpu.hpp>
#endif

using namespace colt5;
using Vector = VectorTensor<float, Cpu>;
using Matrix = MatrixTensor<float, Cpu>;
using Tokens = TokensTensor<float, Cpu>;
using Heads = Tensor<float, Cpu, dynamic, dynamic, dynamic, dynamic>;

void products(const Cpu& policy, const Tokens& x, Tokens& y, const Matrix& weight, Matrix& d_weight,
              const RMSNormParameters<const float>& norm, const RMSNormParameters<float>& d_norm,
              const FeedForwardParameters<const float>& feed_forward_parameters,
              const FeedForwardParameters<float>& d_feed_forward) {
    linear(policy, x, weight);
    linear_vjp(policy, x, x, weight, d_weight);
    norm_linear(policy, x, norm, weight);
    norm_linear_vjp(policy, y.view(), x, x, norm, weight, d_norm, d_weight);
    feed_forward(policy, x, feed_forward_parameters);
    feed_forward_vjp(policy, y.view(), x, x, {}, feed_forward_parameters, d_feed_forward);
}

void rows(const Cpu& policy, const Tokens& x, Tokens& y, const Vector& gamma, Vector& d_gamma, Vector& d_beta) {
    rms_norm(policy, x, gamma);
    rms_norm_vjp(policy, x, x, gamma, d_gamma);
    layer_norm(policy, x, gamma, gamma);
    layer_norm_vjp(policy, x, x, gamma, d_gamma, d_beta);
    assign(policy, y, x + y);
    padding_is_finite(policy, x, {});
    sum_of_squares(policy, x);
    scale(policy, y, 2);
    set_zero(policy, y);
    dropout(policy, y.view(), x, {Random(Seed{0}), 0.5});
    adamw_update(policy, y, {}, x, y, y, {});
}

void attention(const Cpu& policy, const Heads& q, const Tensor<float, Cpu, 1, 8, 2, 2, 4>& kv,
               const Tensor<float, Cpu, 1, 1, 8, 2, 2, 4>& dense_kv, Tensor<float, Cpu, 1, 8, 3, 2, 4>& d_qkv,
               const Tokens& d_y, const Matrix& weight, Matrix& d_weight, Tokens& d_null_kv) {
    const LocalAttention local{.reach = 2};
    local_attention_vjp(policy, local, local_attention_forward(policy, local, q, kv, {}), q, q, kv, {});
    projected_local_attention_vjp(policy, d_qkv.view(), local, d_y, q, kv, {}, 0, 0, weight, d_weight);
    dense_attention_vjp(policy, dense_attention_forward(policy, q, dense_kv, {}, {}), q, q, dense_kv, {}, {});
    relative_position_bias_vjp(policy, {}, relative_position_bias(policy, {}, weight, 2), d_weight.view());
    rotary(policy, d_qkv.view(), 2, Vector().const_view(), {});
    const TokensTensor<TokenIndex, Cpu> indices(policy, {1, 1, 4});
    const auto picked = dense_kv.const_view().reshape(std::array<Index, 4>{8, 2, 2, 4});
    gathered_attention_vjp(policy, gathered_attention_forward(policy, q, picked, indices.const_view(), {}, {}), q, q,
                           picked, indices.const_view(), {}, {});
    null_key_vjp(policy, d_null_kv, with_null_key(policy, dense_kv, d_y, {}, {}).kv, {});
}

void routing(const Cpu& policy, const Tokens& x, Tokens& d_x, const Matrix& token, Matrix& d_token, Mask mask) {
    const auto logits = route_logits(policy, x, token);
    route_logits_vjp(policy, d_x, d_token, logits, x, token);
    const auto cosine = cosine_logits(policy, x, token, 8);
    cosine_logits_vjp(policy, d_x, d_token, logits, cosine.logits, cosine.norms, x, token, 8);
    causal_top_k(policy, {.rate = 0.5}, logits, mask, 2);
    CausalTopKState<float, Cpu> state;
    causal_top_k_next(policy, {.rate = 0.5}, state, logits, mask, 2);
    copy_tokens(policy, d_x.view(), 0, x, 0, 1);
    RoutedKeys<float, Cpu> keys;
    append_keys(policy, keys, Heads(), x, {}, {});
    const auto indices = top_k(policy, logits, mask, 2);
    causal_key_counts(policy, {indices.const_view(), {}}, {indices.const_view(), {}});
    const auto descent = coordinate_descent_forward(policy, {}, 2, logits, mask);
    coordinate_descent_vjp(policy, {}, 2, descent, logits, logits, mask);
    cumulative_softmax_vjp(policy, 1, cumulative_softmax(policy, 1, logits, indices, mask), logits, indices, mask);
    const auto noise = gumbel_noise<float>(policy, Random(Seed{0}), 1, 2, 8);
    const auto slots = sinkhorn_forward(policy, {}, logits, noise, mask, 2);
    sinkhorn_vjp(policy, {}, slots, slots.scores, slots.indices, logits, noise.const_view(), mask);
}

void picking(const Cpu& policy, const Tokens& x, Tokens& y, const TokensTensor<TokenIndex, Cpu>& indices,
             const MatrixTensor<TokenIndex, Cpu>& flat, Mask mask, Vector& d_null_token, Matrix& weight) {
    embedding_vjp(policy, weight.view(), embedding(policy, weight, flat), flat);
    gather(policy, x, indices);
    swap_first_axes(policy, indices);
    gather_sequences(policy, y.view(), weight.const_view(), {});
    scatter_sequences(policy, weight.view(), x.const_view(), {});
    look_back_vjp(policy, look_back(policy, x, 2), 8, 2);
    look_back_counts(policy, 1, 4, 2);
    window_prefixes(policy, MatrixTensor<float, Cpu>(policy, {1, 8}), 2, 0, 4);
    window_prefixes_vjp(policy, MatrixTensor<float, Cpu>(policy, {1, 8}).view(), x.const_view(), 2, 0);
    window_keys_vjp<Cpu, float>(
        policy, window_keys<Cpu, float>(policy, indices.const_view(), x.const_view(), 4, 2, 0, 8).scores.const_view());
    gather_mask(policy, mask, indices);
    scatter(policy, Scatter::add, y, x, flat);
    scatter_vjp(policy, Scatter::mean, x, flat);
    place_scores(policy, pick_scores<float>(policy, x, indices, mask), indices, mask, 8);
    straight_through_scores(policy, x, indices, mask);
    set_short_scores(policy, y.view(), indices, mask, 2);
    const RouteBlocks blocks{8, 4, 2};
    block_shares(policy, blocks, mask);
    pad_sequences(policy, y.view(), x.const_view(), 4);
    merge_block_rows(policy, blocks, 1, x);
    split_blocks(policy, blocks, merge_blocks(policy, blocks, 1, indices, x).scores);
    null_query_vjp(policy, d_null_token, x, unrouted_tokens(policy, flat, mask, 8).const_view());
}

void images(const Cpu& policy, const Tensor<float, Cpu, 1, 8, 8, 4>& maps, MapMask mask) {
    const WindowGrid grid = window_grid("maps", maps, 2);
    from_windows(policy, to_windows(policy, maps, grid), grid);
    window_mask(policy, mask, 1, grid);
    auto tokens = to_windows(policy, maps, grid);
    add_sincos_positions(policy, tokens.view(), grid);
    map_mean_vjp(policy, map_mean(policy, tokens, grid), grid);
}
