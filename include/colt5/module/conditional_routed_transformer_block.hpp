// SPDX-License-Identifier: MIT
#pragma once

#include <string>
#include <type_traits>
#include <utility>

#include <colt5/module/conditional_routed_attention.hpp>
#include <colt5/module/conditional_routed_feed_forward.hpp>
#include <colt5/module/dropout.hpp>

namespace colt5 {

/// A CoLT5 encoder block:  x = attn(x) + x;  x = ff(x) + x.  In training, with dropout of attn(x) and ff(x) if the
/// configuration has it.
///
/// With RouterType::causal it is a decoder block: an output depends on its token and those before it alone, see
/// ConditionalRoutedAttention.
template <TransformerBlockConfig config, typename Scalar, Policy P,
          template <RouterConfig, typename, typename> class RouterTemplate = ConfiguredRouter>
class ConditionalRoutedTransformerBlock
    : public ModuleBase<ConditionalRoutedTransformerBlock<config, Scalar, P, RouterTemplate>, P> {
    using Base = ModuleBase<ConditionalRoutedTransformerBlock, P>;
    friend Base;
    // Of what has other names in AttentionConfig and FeedForwardConfig; they check the rest.
    static_assert(config.num_heavy_attn_tokens_q >= 1,
                  "colt5: TransformerBlockConfig.num_heavy_attn_tokens_q must be at least 1");
    static_assert(config.num_heavy_attn_tokens_kv >= 1,
                  "colt5: TransformerBlockConfig.num_heavy_attn_tokens_kv must be at least 1");
    static_assert(config.num_heavy_ff_tokens >= 1,
                  "colt5: TransformerBlockConfig.num_heavy_ff_tokens must be at least 1");
    static_assert(config.dropout >= 0 && config.dropout < 1, "colt5: TransformerBlockConfig.dropout must be in [0, 1)");
    static constexpr bool has_dropout = config.dropout > 0;

public:
    using Out = TokensTensor<Scalar, P>;
    using Counts = TransformerBlockCounts;
    using Attention =
        ConditionalRoutedAttention<AttentionConfig{
                                       .dim = config.dim,
                                       .num_heavy_tokens_q = config.num_heavy_attn_tokens_q,
                                       .num_heavy_tokens_kv = config.num_heavy_attn_tokens_kv,
                                       .num_routed_kv = config.num_routed_kv,
                                       .num_routed_q = config.num_routed_q,
                                       .light_dim_head = config.light_dim_head,
                                       .light_heads = config.light_heads,
                                       .light_window_size = config.light_window_size,
                                       .heavy_dim_head = config.heavy_dim_head,
                                       .heavy_heads = config.heavy_heads,
                                       .router_straight_through = config.router_straight_through,
                                       .router_type = config.router_type,
                                       .router_kwargs = config.router_kwargs,
                                       .masked_rows = config.masked_rows,
                                       .attends_to_padding = config.attends_to_padding,
                                       .has_light_attn = config.has_light_attn,
                                       .use_null_kv = config.use_null_kv,
                                       .use_null_q_tokens = config.use_null_q_tokens,
                                       .masked_tokens_get_null_q = config.masked_tokens_get_null_q,
                                       .multiply_keys_by_score = config.multiply_keys_by_score,
                                       .multiply_queries_by_score = config.multiply_queries_by_score,
                                       .use_relative_position_bias = config.use_relative_position_bias,
                                       .relative_position_num_buckets = config.relative_position_num_buckets,
                                       .relative_position_max_distance = config.relative_position_max_distance,
                                       .rotary_emb = config.rotary_emb,
                                       .light_rotary_emb = config.light_rotary_emb},
                                   Scalar, P, RouterTemplate>;
    using FeedForward =
        ConditionalRoutedFeedForward<FeedForwardConfig{.dim = config.dim,
                                                       .num_heavy_tokens = config.num_heavy_ff_tokens,
                                                       .feed_forward = config.feed_forward,
                                                       .light_ff_mult = config.light_ff_mult,
                                                       .heavy_ff_mult = config.heavy_ff_mult,
                                                       .router_straight_through = config.router_straight_through,
                                                       .router_type = config.router_type,
                                                       .router_kwargs = config.router_kwargs},
                                     Scalar, P, RouterTemplate>;

    using BranchDropout = std::conditional_t<has_dropout, Dropout, NoDropout>;

    FeedForward conditional_ff;
    Attention conditional_attn;
    [[no_unique_address]] BranchDropout ff_dropout, attn_dropout;

    struct Gradients {
        using Module = ConditionalRoutedTransformerBlock;
        typename FeedForward::Gradients conditional_ff;
        typename Attention::Gradients conditional_attn;
    };

    /// What backward reads. The tokens and the mask must outlive it.
    struct Activations {
        Out out;                               // (b, n, d)
        typename Attention::Activations attn;  // its `out` is attn(x) + x
        typename FeedForward::Activations ff;
        typename BranchDropout::Activations attn_dropout, ff_dropout;

        /// f(prefix + the router's name, Routing) for each router.
        template <typename F>
        void each_routing(F&& f, const std::string& prefix = "") const {
            ff.each_routing(f, prefix + "conditional_ff.");
            attn.each_routing(f, prefix + "conditional_attn.");
        }
        /// Calls f(prefix + the router's name, RouterView) for each router.
        template <typename F>
        void each_router(F&& f, const std::string& prefix = "") const {
            ff.each_router(f, prefix + "conditional_ff.");
            attn.each_router(f, prefix + "conditional_attn.");
        }
    };

    explicit ConditionalRoutedTransformerBlock(const P& policy, Seeds seeds = {})
        : Base(policy),
          conditional_ff(policy, seeds),
          conditional_attn(policy, seeds),
          ff_dropout(seeds, config.dropout),
          attn_dropout(seeds, config.dropout) {}

    /// tokens (b, n, d), mask (b, n) or absent  →  (b, n, d). Saves nothing. `out` may hold the tensor to return, which
    /// is then written to.
    template <Viewable X>
    Out operator()(const X& tokens, Argument<Mask, P> mask = {}, TransformerBlockCounts counts = {},
                   Out out = {}) const {
        const auto [of_attn, of_ff] = expect_counts(counts);
        if (out) expect_shape("out", out.shape(), tokens.shape());
        const auto x = conditional_attn(tokens, mask, of_attn, Residual::tokens);  // (b, n, d)
        return conditional_ff(x, mask, of_ff, Residual::tokens, std::move(out));   // (b, n, d)
    }

    /// The same, with what backward reads.
    template <typename X>
    Activations forward(X&& tokens, Kept<Mask, P> mask = {}, TransformerBlockCounts counts = {}, Out given = {}) const {
        const auto [of_attn, of_ff] = expect_counts(counts);
        if (given) expect_shape("out", given.shape(), tokens.shape());
        auto attn = conditional_attn.forward(std::forward<X>(tokens), mask, of_attn, residual_of(attn_dropout));
        const auto of_attn_dropout = drop(attn_dropout, attn, mask);  // attn.out is drop(attn(x)) + x
        auto ff = conditional_ff.forward(attn.out, mask, of_ff, residual_of(ff_dropout), std::move(given));
        const auto of_ff_dropout = drop(ff_dropout, ff, mask);
        auto out = std::move(ff.out);  // (b, n, d)
        return {std::move(out), std::move(attn), std::move(ff), of_attn_dropout, of_ff_dropout};
    }

    /// Whether gradients have the shapes of those that make_gradients() makes.
    bool fits(const Gradients& gradients) const {
        return conditional_attn.fits(gradients.conditional_attn) && conditional_ff.fits(gradients.conditional_ff);
    }

    void expect_parameters() const {
        conditional_attn.expect_parameters();
        conditional_ff.expect_parameters();
    }

    /// What decode reads of earlier tokens in both halves.
    struct DecodeState {
        DecodeStateOf<FeedForward> conditional_ff;
        DecodeStateOf<Attention> conditional_attn;

        template <typename F, typename... States>
        static void each_tensor(F&& f, const std::string& prefix, States&... states) {
            DecodeStateOf<FeedForward>::each_tensor(f, prefix + "conditional_ff.", states.conditional_ff...);
            DecodeStateOf<Attention>::each_tensor(f, prefix + "conditional_attn.", states.conditional_attn...);
        }
    };
    static constexpr Index model_dim = config.dim;
    /// The sum of what both halves take.
    static constexpr Index cache_bytes(Index batch, Index max_length) {
        return FeedForward::cache_bytes(batch, max_length) + Attention::cache_bytes(batch, max_length);
    }
    DecodeState make_decode_state(Index batch, Index max_length) const {
        return {conditional_ff.make_decode_state(batch, max_length),
                conditional_attn.make_decode_state(batch, max_length)};
    }
    Out decode_next(DecodeState& state, const NextTokens<P>& next, const typename Attention::Tokens& tokens,
                    Out out) const {
        const auto x =
            conditional_attn.decode_next(state.conditional_attn, next, tokens, {}, Residual::tokens);  // (b, m, d)
        return conditional_ff.decode_next(state.conditional_ff, next, x.const_view(), std::move(out), Residual::tokens);
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        FeedForward::each_parameter(f, name_for<F>(prefix, "conditional_ff."), m.conditional_ff...);
        Attention::each_parameter(f, name_for<F>(prefix, "conditional_attn."), m.conditional_attn...);
        if constexpr (has_dropout && (requires { m.ff_dropout; } && ...)) {
            Dropout::each_parameter(f, name_for<F>(prefix, "ff_dropout."), m.ff_dropout...);
            Dropout::each_parameter(f, name_for<F>(prefix, "attn_dropout."), m.attn_dropout...);
        }
    }

private:
    /// The numbers of tokens of the halves. Checked, with the parameters of the second half, before the first one runs
    /// and its router counts a call.
    std::pair<AttentionCounts, FeedForwardCounts> expect_counts(const TransformerBlockCounts& counts) const {
        const AttentionCounts of_attn{detail::token_count("num_heavy_attn_tokens_q", counts.num_heavy_attn_tokens_q,
                                                          config.num_heavy_attn_tokens_q),
                                      detail::token_count("num_heavy_attn_tokens_kv", counts.num_heavy_attn_tokens_kv,
                                                          config.num_heavy_attn_tokens_kv)};
        const FeedForwardCounts of_ff{
            detail::token_count("num_heavy_ff_tokens", counts.num_heavy_ff_tokens, config.num_heavy_ff_tokens)};
        conditional_ff.expect_parameters();
        return {of_attn, of_ff};
    }

    template <Viewable D>
    void expect_backward(const Activations& saved, const D& d_out, const Gradients& gradients,
                         const Out& into = {}) const {
        conditional_attn.expect_saved(saved.attn);
        conditional_ff.expect_saved(saved.ff);
        conditional_attn.expect_parameters();
        conditional_ff.expect_parameters();
        if (!fits(gradients)) expect_like<ConditionalRoutedTransformerBlock>("gradients", *this, gradients);
        expect<typename Attention::Tokens, P>("d_out", d_out);
        expect_shape("d_out", d_out.shape(), saved.attn.tokens.shape());
        if (into) expect_shape("d_tokens", into.shape(), saved.attn.tokens.shape());
    }

    /// Returns d_tokens (b, n, d).
    template <typename SomeActivations, Viewable D>
    Out compute_gradients(SomeActivations& saved, const D& d_out, Gradients& gradients, Out given = {}) const {
        detail::release(saved.out);
        const auto d_x = through(ff_dropout, saved.ff_dropout, d_out, [&](const auto& d) {
            return conditional_ff.backward(detail::forward_part(saved.ff), d, gradients.conditional_ff);
        });  // (b, n, d)
        return through(attn_dropout, saved.attn_dropout, d_x, [&](const auto& d) {
            return conditional_attn.backward(detail::forward_part(saved.attn), d, gradients.conditional_attn,
                                             std::move(given));
        });
    }

    /// With dropout, the halves add no residual themselves.
    static Residual residual_of(const BranchDropout& dropout) {
        return dropout.is_on() ? Residual::none : Residual::tokens;
    }
    /// Dropout of what a half has computed, and its residual.
    template <typename OfHalf>
    auto drop(const BranchDropout& dropout, OfHalf& half, Mask mask) const {
        if constexpr (has_dropout)
            if (dropout.is_on())
                return dropout.forward(this->policy(), half.out.view(), TokensView<const Scalar>(half.tokens), mask);
        return typename BranchDropout::Activations();
    }
    /// The gradient of a half's input, where backward_of(d) is that through the half alone or, without dropout, with
    /// its residual.
    template <Viewable D, typename BackwardOf>
    Out through(const BranchDropout& dropout, const typename BranchDropout::Activations& saved, const D& d_out,
                const BackwardOf& backward_of) const {
        if constexpr (has_dropout)
            if (saved.is_on) {
                Out d_x = backward_of(dropout.backward(this->policy(), saved, d_out));
                assign(this->policy(), d_x, d_x + d_out);
                return d_x;
            }
        return backward_of(d_out);
    }
};

}  // namespace colt5
