// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <colt5/op/copy_tokens.hpp>
#include <colt5/op/norm_linear.hpp>
#include <colt5/op/projected_local_attention.hpp>
#include <colt5/op/rotary.hpp>
#include <colt5/op/zero.hpp>
#include <colt5/schedule/chunks.hpp>
#include <colt5/schedule/next_tokens.hpp>

namespace colt5 {

/// The parameters of light attention, or their gradients.
template <typename T, template <typename> class Norm = LayerNormParameters>
struct LightAttentionParameters {
    Norm<T> norm;
    MatrixView<T> to_qkv;                        // (3 · h · dim_head, d)
    MatrixView<T> to_out;                        // (d, h · dim_head)
    MatrixView<T> relative_attention_bias = {};  // (num_buckets, h), if the logits have a bias
};

/// Light attention chunk by chunk (see Chunks):
///
///     q, k, v = norm(x) · to_qkvᵀ,   out = local_attention(q, k, v) · to_outᵀ + residual
///
/// With frequencies inv_freq (dim_head / 2), queries and keys are rotated by their tokens' positions, in place, as soon
/// as they are projected, and gradients are rotated back just before those of the projection.
///
/// Queries attend to keys of the next chunk, so forward projects one chunk ahead; causal attention needs no next chunk.
/// A halo is as many tokens as a query can attend to on either side (LocalAttention::halo). Every chunk but the last of
/// a sequence is at least three halos long. The reason: backward moves up to two halos of rows from the end of a window
/// to its front, and there they must not overlap the rows that they are copied from. The window of the first chunk is
/// the shortest: it has no halo before the chunk and one after it, four halos in all if the chunk has three. (Causal
/// attention has no halo after the chunk, and moves one halo of rows.)
///
/// `head` is dim_head if it is a head_size of the policy.
template <typename Scalar, Policy P, bool has_bias = false, template <typename> class Norm = LayerNormParameters,
          Index head = dynamic>
struct LightAttentionSchedule {
    template <typename T>
    using Parameters = LightAttentionParameters<T, Norm>;

    Index heads, dim_head;
    LocalAttention attention;
    RelativePositionBuckets buckets = {};  // of the bias, if there is one

    /// Keys and values are always saved. Queries and attention are saved if `save` says so; else backward recomputes
    /// them.
    struct Activations {
        struct OfChunk {
            TokensTensor<Scalar, P> q;  // (b, n, h · dim_head), rotated
            LocalAttentionActivations<Scalar, P> attended;
        };
        TokensTensor<Scalar, P> kv;   // (b, n, 2 · h · dim_head), keys rotated
        std::vector<OfChunk> chunks;  // empty if backward recomputes
    };

    Index inner() const { return heads * dim_head; }

    /// The result goes to out (b, n, d).
    template <Viewable X>
    Activations forward(const P& policy, TokensView<Scalar> out, const X& x, Mask mask,
                        const Parameters<const Scalar>& parameters, VectorView<const float> inv_freq,
                        TokensView<const Scalar> residual, bool save) const {
        Activations saved{.kv = {policy, {x.extent(0), x.extent(1), 2 * inner()}}, .chunks = {}};
        const Chunks chunks = chunks_of(policy, x);
        const auto project = [&](Index i) {  // keys and values of a chunk; returns its queries
            TokensTensor<Scalar, P> q;
            if (i == chunks.count()) return q;
            const Chunk chunk = chunks[i];
            q = {policy, {chunk.sequences, chunk.tokens, inner()}};
            norm_linear(policy, chunk.of(x), norm_with_clean_mask(parameters, chunk, mask),
                        std::array{Projection<Scalar>{q.view(), q_weight(parameters)},
                                   Projection<Scalar>{chunk.of(saved.kv), kv_weight(parameters)}});
            if (inv_freq) {
                rotary(policy, all_heads(q.view()), heads, inv_freq, {{}, chunk.first});
                rotary(policy, all_heads(chunk.of(saved.kv)), heads, inv_freq, {{}, chunk.first});
            }
            return q;
        };
        const auto by_distance = bias_by_distance(policy, parameters);
        auto q = project(0);
        for (Index i = 0; i < chunks.count(); ++i) {
            const Chunk chunk = chunks[i];
            TokensTensor<Scalar, P> next;
            if (!attention.causal) next = project(i + 1);
            auto attended = local_attention_forward(policy, attention, split_heads(q), kv_of(saved, chunk),
                                                    chunk.sequences_of(mask), chunk.first,
                                                    bias_of(by_distance));  // (b, n, h, dim_head)
            linear(policy, chunk.of(out), merge_heads(attended.out), parameters.to_out, {},
                   chunk.of(residual));  // (b, n, d)
            if (save) saved.chunks.push_back({std::move(q), std::move(attended)});
            q = attention.causal ? project(i + 1) : std::move(next);
        }
        return saved;
    }

    /// Throws ValueError if chunks are saved, but not as many as this policy's plan cuts x into.
    template <Viewable X>
    void expect_chunks(const P& policy, const Activations& saved, const X& x) const {
        const Index of_saved = static_cast<Index>(saved.chunks.size()), count = chunks_of(policy, x).count();
        if (of_saved > 0 && of_saved != count)
            expect_value(false, "saved.chunks", std::to_string(count) + ", as many as by this policy's plan", of_saved);
    }

    /// Writes to d_x (b, n, d) the gradient of x plus the terms of `epilogue`; adds the gradients of the parameters to
    /// `gradients`.
    ///
    /// The next chunk still adds to the gradients of this chunk's last keys. So d_qkv holds a window: the chunk and a
    /// halo on each side. Complete rows go on to the norm; the others move to the front of the next window.
    template <Viewable D, Viewable X, std::size_t updates>
    void backward(const P& policy, const Activations& saved, TokensView<Scalar> d_x, const D& d_out, const X& x,
                  Mask mask, const Parameters<const Scalar>& parameters, VectorView<const float> inv_freq,
                  const Parameters<accumulate_t<Scalar>>& gradients,
                  const GradientEpilogue<Scalar, P, updates>& epilogue) const {
        const Chunks chunks = chunks_of(policy, x);
        const Index length = x.extent(1), halo = std::min(attention.halo(), length);
        const Index halo_after = attention.causal ? 0 : halo;
        TokensTensor<Scalar, P> d_qkv(
            policy, {chunks.sequences(), std::min(length, chunks.tokens() + halo + halo_after), 3 * inner()});
        const auto by_distance = bias_by_distance(policy, parameters);
        Index carried = 0;  // rows at the front of the window that hold gradients of the chunk before
        for (Index i = 0; i < chunks.count(); ++i) {
            const Chunk chunk = chunks[i];
            const Index begin = attention.window_begin(chunk.first);
            const Index window = attention.window(chunk.first, chunk.tokens, length);
            const Index complete = chunk.is_last ? window : chunk.first + chunk.tokens - halo - begin;
            const auto d_window = TokensView<Scalar>::unchecked(d_qkv.data(), {chunk.sequences, window, 3 * inner()});
            attention_gradients(policy, d_window, saved, i, chunk, carried, chunk.of(d_out), chunk.of(x), mask,
                                parameters, inv_freq, bias_of(by_distance), gradients);
            const Chunk done{chunk.sequence, chunk.sequences, begin, complete, chunk.is_last};
            if (inv_freq)  // queries and keys: the first two thirds of the heads
                rotary_vjp(policy, all_heads(first_tokens(d_window, complete)), 2 * heads, inv_freq, {{}, begin});
            norm_linear_vjp(policy, done.of(d_x), first_tokens(d_window, complete), done.of(x),
                            norm_with_clean_mask(parameters, done, mask), parameters.to_qkv, gradients.norm,
                            gradients.to_qkv, {}, done.of(epilogue));
            carried = window - complete;
            if (carried > 0) carry(policy, d_window, complete);
        }
    }

    /// The keys and values that later tokens attend to.
    struct DecodeState {
        TokensTensor<Scalar, P> kv;  // (b, rows, 2 · h · dim_head): of DecodeWindow, keys rotated
        std::uint64_t grid_of_queries = 0, grid_of_keys = 0;  // LocalGrid, on which it depends which tokens these are
        std::uint64_t reach = 0;                              // likewise: how far a query looks back
        KeyFormat format = {};

        template <typename F, typename... States>
        static void each_tensor(F&& f, const std::string& prefix, States&... states) {
            f(prefix + "kv", states.kv...);
            if constexpr (requires { f.state(prefix, states.grid_of_keys...); }) {
                f.state(prefix + "grid_of_queries", states.grid_of_queries...);
                f.state(prefix + "grid_of_keys", states.grid_of_keys...);
                f.state(prefix + "reach", states.reach...);
            }
            KeyFormat::each_number(f, prefix, states.format...);
        }
    };
    DecodeState make_decode_state(const P& policy, Index batch, Index max_length, bool rotates) const {
        const auto window = DecodeWindow::of<P, Scalar>(attention, max_length);
        DecodeState state{{policy, {batch, window.rows(max_length), 2 * inner()}},
                          static_cast<std::uint64_t>(window.grid.queries),
                          static_cast<std::uint64_t>(window.grid.keys),
                          static_cast<std::uint64_t>(attention.reach),
                          {heads, dim_head, rotates}};
        set_zero(policy, state.kv);
        return state;
    }

    /// What forward writes at the next tokens x (b, m, d) of sequences whose earlier tokens `state` knows. Attention
    /// must be causal.
    template <Viewable X>
    void decode_next(const P& policy, DecodeState& state, const NextTokens<P>& next, TokensView<Scalar> out, const X& x,
                     Mask mask, const Parameters<const Scalar>& parameters, VectorView<const float> inv_freq,
                     TokensView<const Scalar> residual) const {
        const Index batch = x.extent(0), width = x.extent(1), rows = state.kv.extent(1);
        const auto window = DecodeWindow::of<P, Scalar>(attention, rows);
        auto norm = parameters.norm;
        norm.clean_mask = mask;
        TokensTensor<Scalar, P> q(policy, {batch, width, inner()}), kv(policy, {batch, width, 2 * inner()});
        norm_linear(policy, x, norm,
                    std::array{Projection<Scalar>{q.view(), q_weight(parameters)},
                               Projection<Scalar>{kv.view(), kv_weight(parameters)}});
        auto attended = tensor_like(policy, q);     // (b, m, h · dim_head)
        if (next.real) set_zero(policy, attended);  // of padding
        const auto by_distance = bias_by_distance(policy, parameters);
        next.each_run([&](Index b, Index number) {
            const Index past = next.past_of(b), count = next.count_of(b);
            if (count == 0) return;
            const auto new_q = q.view().range(b, number), new_kv = kv.view().range(b, number);
            if (inv_freq) {
                rotary(policy, all_heads(new_q), heads, inv_freq, {{}, past});
                rotary(policy, all_heads(new_kv), heads, inv_freq, {{}, past});
            }
            // Keys and values from token `origin` on: in the cache, or in `all` if that has no room for the new ones.
            const Index origin = window.origin(past), kept = past - origin;
            const auto cache = state.kv.view().range(b, number);
            auto keys = cache;
            TokensTensor<Scalar, P> all;
            if (kept + count > rows) {
                all = {policy, {number, kept + count, 2 * inner()}};
                keys = all.view();
                copy_tokens(policy, keys, 0, cache, 0, kept);
            }
            copy_tokens(policy, keys, kept, new_kv, 0, count);
            // Queries from the first one of a tile on, of which those that are not new are zeros.
            const Index first = window.first_query(past), before = past - first;
            TokensTensor<Scalar, P> queries(policy, {number, before + count, inner()});
            if (before > 0) set_zero(policy, queries);
            copy_tokens(policy, queries.view(), before, new_q, 0, count);
            Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic> of_queries(policy,
                                                                             {number, before + count, heads, dim_head});
            local_attention_kernel(policy, of_queries.view(), TokensView<accumulate_t<Scalar>>{},
                                   heads_of_kernel<P>(split_heads(queries)), split(keys.const_view(), 2), Mask(),
                                   first - origin, attention, bias_of(by_distance));
            copy_tokens(policy, attended.view().range(b, number), 0, merge_heads(of_queries), before, count);
            // The tokens that the cache keeps move to its front.
            const Index next_origin = window.origin(past + count), rest = past + count - next_origin;
            if (!all && next_origin > origin) {
                all = {policy, {number, rest, 2 * inner()}};
                copy_tokens(policy, all.view(), 0, keys, next_origin - origin, rest);
                copy_tokens(policy, cache, 0, all, 0, rest);
            } else if (all) {
                copy_tokens(policy, cache, 0, all, next_origin - origin, rest);
            }
        });
        linear(policy, out, attended, parameters.to_out, {}, residual);  // (b, m, d)
    }

private:
    /// Writes to d_window the gradients of a chunk's queries and of the keys and values that they see, and adds those
    /// of to_out and of the bias to `gradients`.
    template <Viewable D, Viewable X, typename Bias>
    void attention_gradients(const P& policy, TokensView<Scalar> d_window, const Activations& saved, Index i,
                             const Chunk& chunk, Index carried, const D& d_out, const X& x, Mask mask,
                             const Parameters<const Scalar>& parameters, VectorView<const float> inv_freq,
                             const Bias& bias, const Parameters<accumulate_t<Scalar>>& gradients) const {
        const auto d_table = bias_gradient(gradients);
        const auto kv = kv_of(saved, chunk);
        const Mask mask_of_sequences = chunk.sequences_of(mask);
        if (saved.chunks.empty()) {
            auto q = norm_linear(policy, x, norm_with_clean_mask(parameters, chunk, mask), q_weight(parameters));
            if (inv_freq) rotary(policy, all_heads(q.view()), heads, inv_freq, {{}, chunk.first});
            projected_local_attention_vjp(policy, split(d_window, 3), attention, d_out, split_heads(q), kv,
                                          mask_of_sequences, chunk.first, carried, parameters.to_out, gradients.to_out,
                                          bias, d_table);
        } else {
            const auto& [q, attended] = saved.chunks[static_cast<std::size_t>(i)];
            const auto d_attended =
                linear_vjp(policy, d_out, merge_heads(attended.out), parameters.to_out, gradients.to_out);
            local_attention_vjp(policy, split(d_window, 3), attention, attended, split_heads(d_attended),
                                split_heads(q), kv, mask_of_sequences, chunk.first, carried, bias, d_table);
        }
    }

    template <Viewable X>
    Chunks chunks_of(const P& policy, const X& x) const {
        const Index least = 3 * std::min(attention.halo(), x.extent(1));
        // So that decode_next, and a sequence that goes on, get the same bits.
        const Index multiple = attention.causal ? LocalGridOf<P, Scalar>::of(attention).queries : 1;
        return {policy.memory_plan(), x.extent(0), x.extent(1), least, multiple};
    }
    auto q_weight(const Parameters<const Scalar>& parameters) const { return parameters.to_qkv.range(0, inner()); }
    auto kv_weight(const Parameters<const Scalar>& parameters) const {
        return parameters.to_qkv.range(inner(), 2 * inner());
    }
    static auto norm_with_clean_mask(const Parameters<const Scalar>& parameters, const Chunk& chunk, Mask mask) {
        auto norm = parameters.norm;
        norm.clean_mask = chunk.of(mask);
        return norm;
    }
    /// The bias of the logits by distance, see relative_position_bias. Computed once in each call; NoBias where the
    /// logits have none.
    auto bias_by_distance(const P& policy, const Parameters<const Scalar>& parameters) const {
        if constexpr (has_bias)
            return relative_position_bias(policy, buckets, parameters.relative_attention_bias, attention.reach);
        else
            return NoBias{};
    }
    /// That bias as local_attention takes it.
    template <typename ByDistance>
    auto bias_of(const ByDistance& by_distance) const {
        if constexpr (has_bias)
            return RelativePositionBias<accumulate_t<Scalar>>{buckets, by_distance.const_view()};
        else
            return by_distance;
    }
    /// Where local_attention_vjp adds the gradient of the bias's table.
    static auto bias_gradient(const Parameters<accumulate_t<Scalar>>& gradients) {
        if constexpr (has_bias)
            return gradients.relative_attention_bias;
        else
            return NoBias{};
    }
    auto kv_of(const Activations& saved, const Chunk& chunk) const { return split(chunk.sequences_of(saved.kv), 2); }

    /// Moves the rows of one sequence's window after the first `complete` to its front.
    static void carry(const P& policy, const TokensView<Scalar>& window, Index complete) {
        const Index rest = window.extent(1) - complete;
        const auto rows = window.rows();
        assign(policy, rows.range(0, rest), rows.range(complete, rest));
    }
    /// The first `count` tokens of each sequence of x. Either x is one sequence, or `count` is the length of all.
    static auto first_tokens(const TokensView<Scalar>& x, Index count) {
        return TokensView<Scalar>::unchecked(x.data(), {x.extent(0), count, x.extent(2)});
    }

    template <typename T>
    auto split(const T& x, Index each) const {  // (b, n, each, h, dim_head)
        return x.view().reshape(std::array<Index, 5>{x.extent(0), x.extent(1), each, heads, dim_head});
    }
    template <typename T>
    auto split_heads(const T& x) const {  // (b, n, h, dim_head)
        const auto rows = x.view().reshape(std::array<Index, 4>{x.extent(0), x.extent(1), heads, dim_head});
        return View<typename decltype(rows)::element_type, dynamic, dynamic, dynamic, head>(rows);
    }
    auto all_heads(const TokensView<Scalar>& x) const {  // (b, n, 1, heads of a token, dim_head), for rotary
        return x.reshape(std::array<Index, 5>{x.extent(0), x.extent(1), 1, x.extent(2) / dim_head, dim_head});
    }
    template <typename T>
    auto merge_heads(const T& x) const {  // (b, n, h · dim_head)
        return x.view().reshape(std::array<Index, 3>{x.extent(0), x.extent(1), inner()});
    }
};

}  // namespace colt5
