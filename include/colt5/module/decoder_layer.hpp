// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

#include <colt5/module/dropout.hpp>
#include <colt5/module/gated_feed_forward.hpp>
#include <colt5/module/heavy_attention.hpp>
#include <colt5/module/multi_query_attention.hpp>
#include <colt5/schedule/next_tokens.hpp>

namespace colt5 {

/// Settings of a DecoderLayer. The defaults are those of the paper's base size.
struct DecoderConfig {
    Index dim = 768;
    Index heads = 12;
    Index dim_head = 64;
    Index dim_hidden = 2048;  ///< of the gated feedforward
    /// T5's relative position bias of self attention. This only looks back, so half of the buckets are unused: 64 here
    /// are the 32 of a T5 decoder.
    RelativePositionBuckets buckets{.num_buckets = 64, .max_distance = 128};
    double dropout = 0;  ///< rate in training, of each output before its residual is added
};

/// A layer of the decoder in the CoLT5 paper, without routing:
///
///     x = self_attn(x) + x;  x = cross_attn(x, context) + x;  x = ff(x) + x
///
/// Each part starts with an RMSNorm. Self attention is causal, with a relative position bias, so padding at the end of
/// x changes nothing before it. Cross attention is multi-query.
template <typename Scalar, Policy P>
struct DecoderLayer {
    using Out = TokensTensor<Scalar, P>;
    using SelfAttention = HeavyAttention<Scalar, P, true, true>;
    using CrossAttention = MultiQueryAttention<Scalar, P>;

    SelfAttention self_attn;
    CrossAttention cross_attn;
    GatedFeedForward<Scalar, P> ff;
    std::array<Dropout, 3> dropout;  // of the three parts

    struct Gradients {
        typename SelfAttention::Gradients self_attn;
        typename CrossAttention::Gradients cross_attn;
        typename GatedFeedForward<Scalar, P>::Gradients ff;
    };
    struct Activations {
        TokensTensor<TokenIndex, P> positions;          // (b, 1, n): 0, 1, 2, …
        typename SelfAttention::Activations self_attn;  // its `out` includes the residual
        typename CrossAttention::Activations cross_attn;
        typename GatedFeedForward<Scalar, P>::Activations ff;
        std::array<Dropout::Activations, 3> dropout;
        Out out;  // (b, n, d)
    };

    DecoderLayer(const P& policy, SeedSequence& seeds, const DecoderConfig& config)
        : self_attn(policy, seeds, config.dim, config.heads, config.dim_head, false, false, config.buckets),
          cross_attn(policy, seeds, config.dim, config.heads, config.dim_head),
          ff(policy, seeds, config.dim, config.dim_hidden),
          dropout{Dropout(seeds, config.dropout), Dropout(seeds, config.dropout), Dropout(seeds, config.dropout)} {}

    /// Throws ShapeError when a parameter does not fit tokens of `dim` numbers. The message names the parameter, with
    /// `prefix` before its name.
    void expect_parameters(const std::string& prefix, Index dim) const {
        self_attn.expect_parameters(prefix + "self_attn.", dim);
        cross_attn.expect_parameters(prefix + "cross_attn.", dim);
        ff.expect_parameters(prefix + "ff.", dim);
    }

    /// x (b, n, d), context (b, m, d), its mask (b, m) or absent. `trains`: with dropout, and saving for backward.
    Activations forward(const P& policy, const Out& x, const Out& context, Mask mask, bool trains) const {
        Activations saved;
        saved.positions = {policy, {x.extent(0), 1, x.extent(1)}};
        assign(policy, saved.positions, column_numbers<TokenIndex>());
        saved.self_attn = self_attn.forward(policy, x, of_one_route(x), {}, {}, {}, positions(saved));
        add_residual(policy, 0, saved, saved.self_attn.out, x, trains);
        saved.cross_attn = cross_attn.forward(policy, saved.self_attn.out, context, mask);
        add_residual(policy, 1, saved, saved.cross_attn.out, saved.self_attn.out, trains);
        saved.out = tensor_like(policy, x);
        saved.ff = ff.forward(policy, saved.out.view(), saved.cross_attn.out, trains);
        add_residual(policy, 2, saved, saved.out, saved.cross_attn.out, trains);
        return saved;
    }

    /// Returns d_x (b, n, d). Adds the gradient of the context to d_context (b, m, d).
    Out backward(const P& policy, const Activations& saved, const Out& d_out, const Out& x, const Out& context,
                 Mask mask, Out& d_context, Gradients& gradients) const {
        Out dropped;
        auto d_cross = tensor_like(policy, x);  // of the output of cross attention and its residual
        ff.backward(policy, saved.ff, d_cross.view(), of_part(policy, 2, saved, d_out, dropped), saved.cross_attn.out,
                    gradients.ff);
        assign(policy, d_cross, d_cross + d_out);
        auto d_self = cross_attn.backward(policy, saved.cross_attn, of_part(policy, 1, saved, d_cross, dropped),
                                          saved.self_attn.out, context, mask, d_context, gradients.cross_attn);
        assign(policy, d_self, d_self + d_cross);
        auto d = self_attn.backward(policy, saved.self_attn, of_part(policy, 0, saved, d_self, dropped), x,
                                    of_one_route(x), {}, {}, gradients.self_attn, {}, positions(saved));
        assign(policy, d.d_x, d.d_x + d.d_context.const_view().reshape(x.shape()) + d_self);
        return std::move(d.d_x);
    }

    /// What decode keeps of a layer: the keys and values of self attention, and those of the context, computed once.
    struct DecodeState {
        typename SelfAttention::DecodeState self_attn;
        Out cross_kv;  // (b, m, 2 · dim_head)

        template <typename F, typename... States>
        static void each_tensor(F&& f, const std::string& prefix, States&... states) {
            SelfAttention::DecodeState::each_tensor(f, prefix + "self_attn.", states.self_attn...);
            f(prefix + "cross_attn.kv", states.cross_kv...);
        }
    };
    /// b · (n · (2 · h · dim_head · s + a + 4) + 4 + 2 · m · dim_head · s) for sequences of up to n tokens and contexts
    /// of m, with s = sizeof(Scalar) and a = sizeof(accumulate_t<Scalar>): keys and values of self attention, their
    /// factors and positions, the number of them, and keys and values of the context.
    Index decode_bytes(Index batch, Index context_length, Index max_length) const {
        return SelfAttention::decode_bytes(batch, 1, max_length, self_attn.heads, self_attn.dim_head, false) +
               batch * context_length * 2 * cross_attn.dim_head * static_cast<Index>(sizeof(Scalar));
    }
    /// Of sequences without a token. The context is left to the caller.
    DecodeState make_decode_state(const P& policy, Index batch, Index context_length, Index max_length) const {
        DecodeState state{self_attn.make_decode_state(policy, batch, 1, max_length),
                          {policy, {batch, context_length, 2 * cross_attn.dim_head}}};
        set_zero(policy, state.cross_kv);
        return state;
    }
    /// Throws ShapeError, which names the tensor, unless the state is of a layer of these sizes.
    void expect_state(std::string_view prefix, const DecodeState& state, Index batch, Index context_length,
                      Index max_length) const {
        expect_shape(prefix, "self_attn.kv", state.self_attn.kv.shape(),
                     {batch, 1, max_length, 2 * self_attn.heads * self_attn.dim_head});
        expect_shape(prefix, "cross_attn.kv", state.cross_kv.shape(), {batch, context_length, 2 * cross_attn.dim_head});
    }
    /// The next tokens of decode, as queries and keys of self attention.
    struct NextPositions {
        TokensTensor<TokenIndex, P> positions;            // (b, 1, n)
        Tensor<bool, P, dynamic, dynamic, dynamic> real;  // (b, 1, n)
        TokensTensor<accumulate_t<Scalar>, P> ones;       // (b, 1, n), what values are multiplied by

        NextPositions(const P& policy, const NextTokens<P>& next, Index length)
            : positions(policy, {next.batch(), 1, length}),
              real(policy, positions.shape()),
              ones(policy, positions.shape()) {
            const auto fill_tokens = [&](auto& tensor, const auto& number) {
                fill_with(policy, tensor, [&](std::size_t i) {
                    return static_cast<double>(number(static_cast<Index>(i) / length, static_cast<Index>(i) % length));
                });
            };
            fill_tokens(positions, [&](Index b, Index i) { return next.past_of(b) + i; });
            fill_tokens(real, [&](Index b, Index i) { return i < next.count_of(b); });
            fill(policy, ones, 1);
        }
    };
    /// `out` of forward, without dropout, for the next tokens x (b, n, d), whose keys and values it adds to `state`;
    /// `mask` (b, m) is that of the context.
    Out decode_next(const P& policy, DecodeState& state, const NextPositions& next, const Out& x, Mask mask) const {
        const typename SelfAttention::Positions at{
            next.positions.const_view(), next.positions.const_view(), {}, next.real.const_view()};
        Out self = self_attn.decode_next(policy, state.self_attn, x, of_one_route(x), next.ones.const_view(), {}, at);
        assign(policy, self, self + x);
        Out cross = cross_attn.decode_next(policy, self, state.cross_kv, mask);
        assign(policy, cross, cross + self);
        Out out = ff(policy, cross);
        assign(policy, out, out + cross);
        return out;
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        SelfAttention::each_parameter(f, name_for<F>(prefix, "self_attn."), m.self_attn...);
        CrossAttention::each_parameter(f, name_for<F>(prefix, "cross_attn."), m.cross_attn...);
        GatedFeedForward<Scalar, P>::each_parameter(f, name_for<F>(prefix, "ff."), m.ff...);
        if constexpr ((requires { m.dropout; } && ...))
            for (std::size_t i = 0; i < 3; ++i)
                Dropout::each_parameter(f, name_for<F>(prefix, "dropout.", std::to_string(i), "."), m.dropout[i]...);
    }

private:
    static auto of_one_route(const Out& x) {
        return x.const_view().reshape(std::array{x.extent(0), Index{1}, x.extent(1), x.extent(2)});
    }
    static typename SelfAttention::Positions positions(const Activations& saved) {
        return {saved.positions.const_view(), saved.positions.const_view()};
    }
    void add_residual(const P& policy, std::size_t part, Activations& saved, Out& out, const Out& x,
                      bool trains) const {
        if (trains && dropout[part].is_on())
            saved.dropout[part] = dropout[part].forward(policy, out.view(), x.const_view());
        else
            assign(policy, out, out + x);
    }
    /// The gradient of a part's output, from d_sum, that of output + residual: d_sum, or with dropout `dropped`.
    TokensView<const Scalar> of_part(const P& policy, std::size_t part, const Activations& saved, const Out& d_sum,
                                     Out& dropped) const {
        if (!saved.dropout[part].is_on) return d_sum.const_view();
        dropped = dropout[part].backward(policy, saved.dropout[part], d_sum);
        return dropped.const_view();
    }
};

}  // namespace colt5
