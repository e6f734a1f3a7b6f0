// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <utility>

#include <colt5/module/heavy_attention.hpp>
#include <colt5/op/zero.hpp>

namespace colt5 {

/// Routing tokens that depend on the queries of cross attention (an item of the reference's to-do list). They attend to
/// the source, which are these queries, before they score the tokens of the context:
///
///     routing_tokens[b] = t + attention(t, source[b])
///
/// where t (r, d) is a router's routing_token and attention is a HeavyAttention.
template <typename Scalar, Policy P>
struct ConditionedRoutingTokens {
    using Attention = HeavyAttention<Scalar, P>;
    using Logit = accumulate_t<Scalar>;

    Attention attn;

    struct Gradients {
        typename Attention::Gradients attn;
    };
    struct Activations {
        TokensTensor<Scalar, P> learned;         // (b, r, d): t, for each sample
        TokensTensor<Scalar, P> routing_tokens;  // (b, r, d)
        typename Attention::Activations attended;
    };

    ConditionedRoutingTokens(const P& policy, SeedSequence& seeds, Index dim, Index heads, Index dim_head)
        : attn(policy, seeds, dim, heads, dim_head) {}

    /// t (r, d), source (b, n, d) whose padding is finite, mask (b, n) or absent
    Activations forward(const P& policy, MatrixView<const Scalar> routing_token, TokensView<const Scalar> source,
                        Mask mask) const {
        const auto [routes, dim] = routing_token.shape();
        Activations saved{{policy, {source.extent(0), routes, dim}}, {policy, {source.extent(0), routes, dim}}, {}};
        const std::array<Index, 2> flat{source.extent(0), routes * dim};
        assign(policy, saved.learned.view().reshape(flat),
               row(routing_token.reshape(std::array<Index, 1>{routes * dim})));
        saved.attended = attn.forward(policy, saved.learned, as_keys(source), key_mask(mask), {});
        assign(policy, saved.routing_tokens, saved.learned + saved.attended.out);
        return saved;
    }

    /// d_routing_tokens (b, r, d); d_routing_token (r, d) and d_source (b, n, d) accumulate.
    void backward(const P& policy, const Activations& saved, TokensView<const Logit> d_routing_tokens,
                  TokensView<const Scalar> source, Mask mask, MatrixView<Logit> d_routing_token,
                  TokensView<Scalar> d_source, Gradients& gradients) const {
        TokensTensor<Scalar, P> d_out(policy, d_routing_tokens.shape());
        assign(policy, d_out, as_expression(d_routing_tokens));
        const auto d = attn.backward(policy, saved.attended, d_out, saved.learned, as_keys(source), key_mask(mask), {},
                                     gradients.attn);
        assign(policy, d_source, d_source + d.d_context.view().reshape(d_source.shape()));
        for (Index b = 0; b < d_routing_tokens.extent(0); ++b)
            assign(policy, d_routing_token, d_routing_token + d_routing_tokens[b] + d.d_x.const_view()[b]);
    }

    void expect_parameters(std::string_view prefix, Index dim) const { attn.expect_parameters(prefix, dim); }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        Attention::each_parameter(f, prefix, m.attn...);
    }

private:
    static auto as_keys(TokensView<const Scalar> source) {
        return source.reshape(std::array<Index, 4>{source.extent(0), 1, source.extent(1), source.extent(2)});
    }
    static KeyMask key_mask(Mask mask) {
        if (!mask) return {};
        return mask.reshape(std::array<Index, 3>{mask.extent(0), 1, mask.extent(1)});
    }
};

/// Takes their place where the configuration conditions no routing on queries.
struct LearnedRoutingTokens {
    struct Gradients {};
    struct Activations {};

    template <Policy P>
    LearnedRoutingTokens(const P&, SeedSequence&, Index, Index, Index) {}
    void expect_parameters(std::string_view, Index) const {}
    template <typename F, typename... M>
    static void each_parameter(F&&, const std::string&, M&...) {}
};

}  // namespace colt5
