// SPDX-License-Identifier: MIT
#pragma once

#include <string>
#include <string_view>

#include <colt5/module/layers.hpp>
#include <colt5/op/dense_attention.hpp>

namespace colt5 {

/// The heavy branch of attention: the routed queries see all the routed keys and values (the reference's Attention).
///
/// One RMSNorm for queries and context → to_q, to_kv → attention → to_out; no biases. With several routes, each route's
/// keys and values serve heads / routes of the heads; rows of to_kv are laid out (route, head in route, [key, value]).
template <typename Scalar, Policy P>
struct HeavyAttention {
    using Scores = TokensView<const accumulate_t<Scalar>>;  // (b, r, k): values are multiplied by them; may be absent

    RMSNorm<Scalar, P> norm;
    Linear<Scalar, P> to_q, to_kv, to_out;
    Index heads, dim_head;

    struct Gradients {
        RMSNorm<accumulate_t<Scalar>, P> norm;
        Linear<accumulate_t<Scalar>, P> to_q, to_kv, to_out;
    };
    struct Activations {
        TokensTensor<Scalar, P> out;                               // (b, n, d)
        TokensTensor<Scalar, P> q;                                 // (b, n, h · dim_head)
        Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic> kv;  // (b, r, k, h / r · 2 · dim_head)
        DenseAttentionActivations<Scalar, P> attention;
    };
    struct InputGradients {
        TokensTensor<Scalar, P> d_x;                                      // (b, n, d)
        Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic> d_context;  // (b, r, k, d)
        TokensTensor<accumulate_t<Scalar>, P> d_scores;                   // (b, r, k), if there are scores
    };

    HeavyAttention(const P& policy, SeedSequence& seeds, Index dim, Index heads_, Index dim_head_)
        : norm(policy, dim),
          to_q(policy, seeds, dim, detail::expect_heads(heads_, dim_head_), false),
          to_kv(policy, seeds, dim, 2 * heads_ * dim_head_, false),
          to_out(policy, seeds, heads_ * dim_head_, dim, false),
          heads(heads_),
          dim_head(dim_head_) {}

    /// Throws ShapeError when a parameter does not fit tokens of `dim` numbers. The message names the parameter, with
    /// `prefix` before its name.
    void expect_parameters(std::string_view prefix, Index dim) const {
        expect_shape(prefix, "norm.gamma", norm.gamma.shape(), {dim});
        expect_shape(prefix, "to_q.weight", to_q.weight.shape(), {inner(), dim});
        expect_shape(prefix, "to_kv.weight", to_kv.weight.shape(), {2 * inner(), dim});
        expect_shape(prefix, "to_out.weight", to_out.weight.shape(), {dim, inner()});
    }

    /// x (b, n, d), context (b, r, k, d), mask and scores (b, r, k), which may be absent
    template <Viewable X, Viewable C>
    Activations forward(const P& policy, const X& x, const C& context, KeyMask mask, Scores scores) const {
        expect_inputs(x, context, mask, scores);
        auto q = to_q(policy, norm(policy, x));                                // (b, n, h · dim_head)
        auto kv = routed_linear(policy, norm(policy, context), to_kv.weight);  // (b, r, k, h / r · 2 · dim_head)
        auto attended = dense_attention_forward(policy, split_q(q), split_kv(kv), mask, scores);  // (b, n, h, dim_head)
        auto out = to_out(policy, merge_q(attended.out));                                         // (b, n, d)
        return {std::move(out), std::move(q), std::move(kv), std::move(attended)};
    }

    template <Viewable D, Viewable X, Viewable C>
    InputGradients backward(const P& policy, const Activations& saved, const D& d_out, const X& x, const C& context,
                            KeyMask mask, Scores scores, Gradients& gradients) const {
        auto d = input_gradients(policy, saved, scores);
        backward(policy, saved, d, d_out, x, context, mask, scores, gradients);
        return d;
    }

    /// The same into tensors that are there before anything else is allocated.
    template <Viewable D, Viewable X, Viewable C>
    void backward(const P& policy, const Activations& saved, InputGradients& d, const D& d_out, const X& x,
                  const C& context, KeyMask mask, Scores scores, Gradients& gradients) const {
        expect_inputs(x, context, mask, scores);
        expect_like<HeavyAttention>("gradients", *this, gradients);
        const auto [batch, routes, keys, dim] = context.shape();
        expect_shape("saved.q", saved.q.shape(), {batch, x.extent(1), inner()});
        expect_shape("saved.kv", saved.kv.shape(), {batch, routes, keys, 2 * inner() / routes});
        expect_shape("saved.attention.out", saved.attention.out.shape(), {batch, x.extent(1), heads, dim_head});
        expect_shape("saved.attention.log_sum_exp", saved.attention.log_sum_exp.shape(), {batch, heads, x.extent(1)});
        expect_shape("d_out", d_out.shape(), x.shape());
        expect_shape("d.d_x", d.d_x.shape(), x.shape());
        expect_shape("d.d_context", d.d_context.shape(), context.shape());
        if (scores) expect_shape("d.d_scores", d.d_scores.shape(), scores.shape());
        const auto d_attended = to_out.backward(policy, d_out, merge_q(saved.attention.out), gradients.to_out);
        const auto d_attention = dense_attention_vjp(policy, saved.attention, split_q(d_attended), split_q(saved.q),
                                                     split_kv(saved.kv), mask, scores);
        const auto d_context = routed_linear_vjp(policy, d_attention.d_kv.view().reshape(saved.kv.shape()),
                                                 norm(policy, context), to_kv.weight, gradients.to_kv.weight.view());
        const auto d_x = to_q.backward(policy, merge_q(d_attention.d_q), norm(policy, x), gradients.to_q);
        norm.backward(policy, d.d_x.view(), d_x, x, gradients.norm);
        norm.backward(policy, d.d_context.view(), d_context, context, gradients.norm);
        if (scores) assign(policy, d.d_scores, d_attention.d_value_scale);
    }
    InputGradients input_gradients(const P& policy, const Activations& saved, Scores scores) const {
        const auto [batch, routes, keys, width] = saved.kv.shape();
        InputGradients d{tensor_like(policy, saved.out), {policy, {batch, routes, keys, to_kv.weight.extent(1)}}, {}};
        if (scores) d.d_scores = tensor_like(policy, scores);
        return d;
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        RMSNorm<Scalar, P>::each_parameter(f, prefix + "norm.", m.norm...);
        Linear<Scalar, P>::each_parameter(f, prefix + "to_q.", m.to_q...);
        Linear<Scalar, P>::each_parameter(f, prefix + "to_kv.", m.to_kv...);
        Linear<Scalar, P>::each_parameter(f, prefix + "to_out.", m.to_out...);
    }

private:
    Index inner() const { return heads * dim_head; }

    template <Viewable X, Viewable C>
    void expect_inputs(const X& x, const C& context, KeyMask mask, Scores scores) const {
        const auto [batch, routes, keys, dim] = context.shape();
        expect_parameters("", x.extent(2));
        expect_shape("context", context.shape(), {x.extent(0), dynamic, dynamic, x.extent(2)});
        if (mask) expect_shape("mask", mask.shape(), {batch, routes, keys});
        if (scores) expect_shape("scores", scores.shape(), {batch, routes, keys});
        if (routes < 1 || heads % routes != 0)
            expect_value(false, "routes of context",
                         colt5::detail::concat({"a divisor of ", std::to_string(heads), " heads"}), routes);
    }

    auto split_q(const TokensTensor<Scalar, P>& q) const {  // (b, n, h, dim_head)
        return q.view().reshape(std::array<Index, 4>{q.extent(0), q.extent(1), heads, dim_head});
    }
    auto split_kv(
        const Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic>& kv) const {  // (b, r, k, h / r, 2, dim_head)
        const auto [batch, routes, keys, width] = kv.shape();
        return kv.view().reshape(std::array<Index, 6>{batch, routes, keys, heads / routes, 2, dim_head});
    }
    template <typename T>
    auto merge_q(const T& q) const {  // (b, n, h · dim_head)
        return q.view().reshape(std::array<Index, 3>{q.extent(0), q.extent(1), heads * dim_head});
    }
};

}  // namespace colt5
