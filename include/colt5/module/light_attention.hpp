// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <vector>

#include <colt5/module/layers.hpp>
#include <colt5/module/parts.hpp>
#include <colt5/op/clean_padding.hpp>
#include <colt5/op/projected_local_attention.hpp>

namespace colt5 {

/// The light branch of attention: every token sees the tokens around it (LocalMHA of the package local-attention).
///
/// LayerNorm → queries, keys and values → local attention → output projection; no biases in the projections.
///
/// Works on parts of the batch (see MemoryPlan). Keys and values are kept for backward, which computes queries and
/// attention again unless the plan says otherwise.
template <typename Scalar, Policy P>
struct LightAttention {
    LayerNorm<Scalar, P> norm;
    Linear<Scalar, P> to_qkv, to_out;
    Index heads, dim_head;
    LocalAttention attention;

    struct Gradients {
        LayerNorm<accumulate_t<Scalar>, P> norm;
        Linear<accumulate_t<Scalar>, P> to_qkv, to_out;
    };
    /// What backward does not compute again.
    struct Pass {
        struct OfPart {
            TokensTensor<Scalar, P> q;  // (b, n, h · dim_head)
            LocalAttentionPass<Scalar, P> attended;
        };
        TokensTensor<Scalar, P> kv;  // (b, n, 2 · h · dim_head)
        std::vector<OfPart> parts;   // or nothing
    };

    LightAttention(const P& policy, SeedSequence& seeds, Index dim, Index heads_, Index dim_head_,
                   LocalAttention attention_)
        : norm(policy, dim),
          to_qkv(policy, seeds, dim, 3 * detail::expect_heads(heads_, dim_head_), false),
          to_out(policy, seeds, heads_ * dim_head_, dim, false),
          heads(heads_),
          dim_head(dim_head_),
          attention(attention_) {}

    /// Throws ShapeError, which calls it `prefix` + its name, when a parameter does not fit tokens of `dim` numbers.
    void expect_parameters(std::string_view prefix, Index dim) const {
        expect_shape(prefix, "norm.weight", norm.weight.shape(), {dim});
        expect_shape(prefix, "norm.bias", norm.bias.shape(), {dim});
        expect_shape(prefix, "to_qkv.weight", to_qkv.weight.shape(), {3 * inner(), dim});
        expect_shape(prefix, "to_out.weight", to_out.weight.shape(), {dim, inner()});
    }

    template <Viewable X>
    TokensTensor<Scalar, P> operator()(const P& policy, const X& x, Mask mask) const {
        auto out = tensor_like(policy, x);
        forward(policy, out.view(), x, mask, false);
        return out;
    }

    /// The result goes to out (b, n, d); `add` (b, n, d), such as a residual, is added to it if there is one.
    template <Viewable X>
    Pass forward(const P& policy, TokensView<Scalar> out, const X& x, Mask mask, bool keep,
                 TokensView<const Scalar> add = {}) const {
        expect_parameters("", x.extent(2));
        expect_shape("out", out.shape(), x.shape());
        if (mask) expect_shape("mask", mask.shape(), {x.extent(0), x.extent(1)});
        if (add) expect_shape("add", add.shape(), x.shape());
        Pass pass{.kv = {policy, {x.extent(0), x.extent(1), 2 * inner()}}, .parts = {}};
        const Parts parts = parts_of(policy, x);
        const auto project = [&](Index i) {  // keys and values; returns queries
            TokensTensor<Scalar, P> q;
            if (i == parts.count()) return q;
            q = {policy, {parts[i].sequences, parts[i].tokens, inner()}};
            norm_linear(policy, parts[i].of(x), norm.parameters(parts[i].of(to_clean<P>(mask))),
                        std::array{Projection<Scalar>{q.view(), q_weight()},
                                   Projection<Scalar>{parts[i].of(pass.kv), kv_weight()}});
            return q;
        };
        auto q = project(0);
        for (Index i = 0; i < parts.count(); ++i) {
            const Part part = parts[i];
            auto next = project(i + 1);                              // queries see keys of the next part
            auto attended = attend(policy, part, q, pass.kv, mask);  // (b, n, h, dim_head)
            to_out(policy, part.of(out), detail::merge_heads(attended.out), part.of(add));  // (b, n, d)
            if (keep) pass.parts.push_back({std::move(q), std::move(attended)});
            q = std::move(next);
        }
        return pass;
    }

    /// The gradient goes to d_x (b, n, d), and what else is to.
    template <Viewable D, Viewable X, std::size_t routes = 0>
    void backward(const P& policy, const Pass& pass, TokensView<Scalar> d_x, const D& d_out, const X& x, Mask mask,
                  Gradients& gradients, const SharedGradient<Scalar, P, routes>& shared = {}) const {
        const Parts parts = parts_of(policy, x);
        const Index length = x.extent(1), halo = std::min(attention.halo(), length);
        expect_parameters("", x.extent(2));
        expect_like<LightAttention>("gradients", *this, gradients);
        expect_shape("pass.kv", pass.kv.shape(), {x.extent(0), length, 2 * inner()});
        const auto kept = static_cast<Index>(pass.parts.size());
        if (kept > 0 && kept != parts.count())
            expect_value(false, "pass.parts", std::to_string(parts.count()) + ", as many as by this policy's plan",
                         kept);
        expect_shape("d_x", d_x.shape(), x.shape());
        expect_shape("d_out", d_out.shape(), x.shape());
        if (mask) expect_shape("mask", mask.shape(), {x.extent(0), length});
        detail::check_shared_gradient(shared, x);
        // What a part does to the keys and values around it is complete when the next part is done: the gradients of a
        // window of tokens move along.
        TokensTensor<Scalar, P> d_qkv(policy,
                                      {parts.sequences(), std::min(length, parts.tokens() + 2 * halo), 3 * inner()});
        for (Index i = 0; i < parts.count(); ++i) {
            const Part part = parts[i];
            const Index begin = attention.window_begin(part.first);
            const Index window = attention.window(part.first, part.tokens, length);
            const Index complete = part.is_last ? window : part.first + part.tokens - halo - begin;
            const auto d_window = TokensView<Scalar>::unchecked(d_qkv.data(), {part.sequences, window, 3 * inner()});
            const auto kv = split(part.sequences_of(pass.kv), 2);
            if (pass.parts.empty()) {
                const auto q = norm_linear(policy, part.of(x), norm.parameters(part.of(to_clean<P>(mask))), q_weight());
                projected_local_attention_vjp(policy, split(d_window, 3), attention, part.of(d_out), split_heads(q), kv,
                                              part.sequences_of(mask), part.first, to_out.weight,
                                              gradients.to_out.weight.view());
            } else {
                const auto& [q, attended] = pass.parts[static_cast<std::size_t>(i)];
                const auto d_attended =
                    to_out.backward(policy, part.of(d_out), detail::merge_heads(attended.out), gradients.to_out);
                local_attention_vjp(policy, split(d_window, 3), attention, attended, split_heads(d_attended),
                                    split_heads(q), kv, part.sequences_of(mask), part.first);
            }
            const Part done{part.sequence, part.sequences, begin, complete, part.is_last};
            norm_linear_vjp(policy, done.of(d_x), first_tokens(d_window, complete), done.of(x),
                            norm.parameters(done.of(to_clean<P>(mask))), to_qkv.weight, gradients.norm.parameters(),
                            gradients.to_qkv.weight.view(), {}, done.of(shared));
            if (!part.is_last) carry(policy, d_window, complete);
        }
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        LayerNorm<Scalar, P>::each_parameter(f, prefix + "norm.", m.norm...);
        Linear<Scalar, P>::each_parameter(f, prefix + "to_qkv.", m.to_qkv...);
        Linear<Scalar, P>::each_parameter(f, prefix + "to_out.", m.to_out...);
    }

private:
    Index inner() const { return heads * dim_head; }
    auto q_weight() const { return to_qkv.weight.const_view().range(0, inner()); }
    auto kv_weight() const { return to_qkv.weight.const_view().range(inner(), 2 * inner()); }

    /// So large that queries see keys of the parts next to their own at most, and that what is carried from one window
    /// to the next does not meet its new place.
    template <Viewable X>
    Parts parts_of(const P& policy, const X& x) const {
        return {policy.memory_plan(), x.extent(0), x.extent(1), 3 * std::min(attention.halo(), x.extent(1))};
    }
    auto attend(const P& policy, const Part& part, const TokensTensor<Scalar, P>& q, const TokensTensor<Scalar, P>& kv,
                Mask mask) const {
        return local_attention_forward(policy, attention, split_heads(q), split(part.sequences_of(kv), 2),
                                       part.sequences_of(mask), part.first);
    }
    /// The window of one sequence without its first `complete` tokens, moved to where it began.
    static void carry(const P& policy, const TokensView<Scalar>& window, Index complete) {
        const Index rest = window.extent(1) - complete;
        const auto rows = window.rows();
        assign(policy, rows.range(0, rest), rows.range(complete, rest));
    }

    template <typename T>
    auto split(const T& x, Index parts) const {  // (b, n, parts, h, dim_head)
        return x.view().reshape(std::array<Index, 5>{x.extent(0), x.extent(1), parts, heads, dim_head});
    }
    template <typename T>
    auto split_heads(const T& x) const {  // (b, n, h, dim_head)
        return x.view().reshape(std::array<Index, 4>{x.extent(0), x.extent(1), heads, dim_head});
    }
    /// The first tokens of one sequence, or all tokens.
    static auto first_tokens(const TokensView<Scalar>& x, Index count) {
        return TokensView<Scalar>::unchecked(x.data(), {x.extent(0), count, x.extent(2)});
    }
};

}  // namespace colt5
