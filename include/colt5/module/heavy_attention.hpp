// SPDX-License-Identifier: MIT
#pragma once

#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include <colt5/module/layers.hpp>
#include <colt5/op/dense_attention.hpp>
#include <colt5/op/null_key.hpp>
#include <colt5/op/rotary.hpp>

namespace colt5 {

/// The heavy branch of attention: the routed queries see all the routed keys and values (the reference's Attention).
///
/// One RMSNorm for queries and context → to_q, to_kv → attention → to_out; no biases. With several routes, each route's
/// keys and values serve heads / routes of the heads; rows of to_kv are laid out (route, head in route, [key, value]).
/// With a null key, every head has one learned key and value more, which every query sees and no mask hides. With
/// `has_bias`, the logits get T5's relative position bias, by the positions that queries and keys came from; that of
/// the null key is 0. With `rotary_emb`, queries and keys are rotated by these positions; the null key is not.
template <typename Scalar, Policy P, bool has_bias = false>
struct HeavyAttention {
    /// Where queries (b, n) and keys (b, r, k) came from: their indices in a sequence. Absent: 0, 1, 2, … Read only for
    /// the bias and the rotation.
    struct Positions {
        MatrixView<const TokenIndex> queries;
        TokensView<const TokenIndex> keys;
    };
    using Scores = TokensView<const accumulate_t<Scalar>>;  // (b, r, k): values are multiplied by them; may be absent
    using QueryScores =
        MatrixView<const accumulate_t<Scalar>>;  // (b, n): queries are multiplied by them; may be absent

    RMSNorm<Scalar, P> norm;
    TokensTensor<Scalar, P> null_kv;  // (2, h, dim_head), or empty
    Linear<Scalar, P> to_q, to_kv, to_out;
    RelativeAttentionBias<Scalar, P> relative_attention_bias;  // empty unless has_bias
    VectorTensor<float, P> inv_freq;                           // (dim_head / 2), of the rotation, or empty
    Index heads, dim_head;
    bool multiply_keys_by_score;  // as the values
    RelativePositionBuckets buckets;

    struct Gradients {
        RMSNorm<accumulate_t<Scalar>, P> norm;
        TokensTensor<accumulate_t<Scalar>, P> null_kv;
        Linear<accumulate_t<Scalar>, P> to_q, to_kv, to_out;
        RelativeAttentionBias<accumulate_t<Scalar>, P> relative_attention_bias;
    };
    struct Activations {
        TokensTensor<Scalar, P> out;                               // (b, n, d)
        TokensTensor<Scalar, P> q;                                 // (b, n, h · dim_head), rotated
        Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic> kv;  // (b, r, k, h / r · 2 · dim_head), keys rotated
        DenseAttentionActivations<Scalar, P> attention;
    };
    struct InputGradients {
        TokensTensor<Scalar, P> d_x;                                      // (b, n, d)
        Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic> d_context;  // (b, r, k, d)
        TokensTensor<accumulate_t<Scalar>, P> d_scores;                   // (b, r, k), if there are scores
        MatrixTensor<accumulate_t<Scalar>, P> d_scores_q{};               // (b, n), if there are scores of queries
    };

    HeavyAttention(const P& policy, SeedSequence& seeds, Index dim, Index heads_, Index dim_head_,
                   bool use_null_kv = false, bool multiply_keys_by_score_ = false,
                   const RelativePositionBuckets& buckets_ = {}, bool rotary_emb = false)
        : norm(policy, dim),
          to_q(policy, seeds, dim, detail::expect_heads(heads_, dim_head_), false),
          to_kv(policy, seeds, dim, 2 * heads_ * dim_head_, false),
          to_out(policy, seeds, heads_ * dim_head_, dim, false),
          heads(heads_),
          dim_head(dim_head_),
          multiply_keys_by_score(multiply_keys_by_score_),
          buckets(buckets_) {
        if (use_null_kv) {
            null_kv = {policy, {2, heads, dim_head}};
            fill_normal(policy, null_kv, seeds.next());
        }
        if constexpr (has_bias) relative_attention_bias = {policy, seeds, buckets, heads, dim};
        if (rotary_emb) inv_freq = rotary_frequencies(policy, dim_head);
    }

    /// Throws ShapeError when a parameter does not fit tokens of `dim` numbers. The message names the parameter, with
    /// `prefix` before its name.
    void expect_parameters(std::string_view prefix, Index dim) const {
        expect_shape(prefix, "norm.gamma", norm.gamma.shape(), {dim});
        if (null_kv) expect_shape(prefix, "null_kv", null_kv.shape(), {2, heads, dim_head});
        expect_shape(prefix, "to_q.weight", to_q.weight.shape(), {inner(), dim});
        expect_shape(prefix, "to_kv.weight", to_kv.weight.shape(), {2 * inner(), dim});
        expect_shape(prefix, "to_out.weight", to_out.weight.shape(), {dim, inner()});
        if constexpr (has_bias)
            expect_shape(prefix, "relative_attention_bias.weight", relative_attention_bias.weight.shape(),
                         {buckets.num_buckets, heads});
    }

    /// x (b, n, d), context (b, r, k, d), mask and scores (b, r, k), scores_q (b, n); the last three may be absent
    template <Viewable X, Viewable C>
    Activations forward(const P& policy, const X& x, const C& context, KeyMask mask, Scores scores,
                        QueryScores scores_q = {}, const Positions& positions = {}) const {
        expect_inputs(x, context, mask, scores, scores_q);
        auto q = to_q(policy, norm(policy, x));                                // (b, n, h · dim_head)
        auto kv = routed_linear(policy, norm(policy, context), to_kv.weight);  // (b, r, k, h / r · 2 · dim_head)
        if (inv_freq) {
            rotary(policy, rows_of_q(q.view()), heads, inv_freq, {positions.queries});
            rotary(policy, rows_of_kv(kv.view()), 1, inv_freq, {of_each_route(positions.keys)});
        }
        const auto scaled_q = scaled(policy, q, scores_q);
        const auto seen = attended_keys(policy, kv, mask, scores);
        const auto by_distance = bias_by_distance(policy);
        auto attended =
            dense_attention_forward(policy, split_q(scaled_q ? scaled_q : q), seen.kv, seen.mask, seen.value_scale,
                                    bias_of(by_distance, positions));  // (b, n, h, dim_head)
        auto out = to_out(policy, merge_q(attended.out));              // (b, n, d)
        return {std::move(out), std::move(q), std::move(kv), std::move(attended)};
    }

    template <Viewable D, Viewable X, Viewable C>
    InputGradients backward(const P& policy, const Activations& saved, const D& d_out, const X& x, const C& context,
                            KeyMask mask, Scores scores, Gradients& gradients, QueryScores scores_q = {},
                            const Positions& positions = {}) const {
        auto d = input_gradients(policy, saved, scores, scores_q);
        backward(policy, saved, d, d_out, x, context, mask, scores, gradients, scores_q, positions);
        return d;
    }

    /// The same into tensors that are there before anything else is allocated.
    template <Viewable D, Viewable X, Viewable C>
    void backward(const P& policy, const Activations& saved, InputGradients& d, const D& d_out, const X& x,
                  const C& context, KeyMask mask, Scores scores, Gradients& gradients, QueryScores scores_q = {},
                  const Positions& positions = {}) const {
        expect_inputs(x, context, mask, scores, scores_q);
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
        if (scores_q) expect_shape("d.d_scores_q", d.d_scores_q.shape(), scores_q.shape());
        const auto d_attended = to_out.backward(policy, d_out, merge_q(saved.attention.out), gradients.to_out);
        const auto scaled_q = scaled(policy, saved.q, scores_q);
        const auto seen = attended_keys(policy, saved.kv, mask, scores);
        const auto by_distance = bias_by_distance(policy);
        auto d_attention = dense_attention_vjp(
            policy, saved.attention, split_q(d_attended), split_q(scaled_q ? scaled_q : saved.q), seen.kv, seen.mask,
            seen.value_scale, bias_of(by_distance, positions), bias_gradient(gradients));
        if (null_kv) {
            auto [d_kv, d_value_scale] = null_key_vjp(policy, gradients.null_kv.view(), d_attention.d_kv,
                                                      d_attention.d_value_scale.const_view());
            d_attention.d_kv = std::move(d_kv);
            d_attention.d_value_scale = std::move(d_value_scale);
        }
        if (scores && multiply_keys_by_score) {
            const auto d_kv = d_attention.d_kv.view().reshape(saved.kv.shape());
            assign(policy, d.d_scores, row_sum(d_kv * saved.kv));
            assign(policy, d_kv, d_kv * column(scores));
        } else if (scores) {
            assign(policy, d.d_scores, d_attention.d_value_scale);
        }
        if (scores_q) {
            const auto d_q = d_attention.d_q.view().reshape(saved.q.shape());
            assign(policy, d.d_scores_q, row_sum(d_q * saved.q));
            assign(policy, d_q, d_q * column(scores_q));
        }
        if (inv_freq) {
            rotary_vjp(policy, rows_of_q(d_attention.d_q.view()), heads, inv_freq, {positions.queries});
            rotary_vjp(policy, rows_of_kv(d_attention.d_kv.view()), 1, inv_freq, {of_each_route(positions.keys)});
        }
        const auto d_context = routed_linear_vjp(policy, d_attention.d_kv.view().reshape(saved.kv.shape()),
                                                 norm(policy, context), to_kv.weight, gradients.to_kv.weight.view());
        const auto d_x = to_q.backward(policy, merge_q(d_attention.d_q), norm(policy, x), gradients.to_q);
        norm.backward(policy, d.d_x.view(), d_x, x, gradients.norm);
        norm.backward(policy, d.d_context.view(), d_context, context, gradients.norm);
    }
    InputGradients input_gradients(const P& policy, const Activations& saved, Scores scores,
                                   QueryScores scores_q = {}) const {
        const auto [batch, routes, keys, width] = saved.kv.shape();
        InputGradients d{
            tensor_like(policy, saved.out), {policy, {batch, routes, keys, to_kv.weight.extent(1)}}, {}, {}};
        if (scores) d.d_scores = tensor_like(policy, scores);
        if (scores_q) d.d_scores_q = tensor_like(policy, scores_q);
        return d;
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        if (std::get<0>(std::tie(m...)).null_kv) f(prefix + "null_kv", m.null_kv...);
        RMSNorm<Scalar, P>::each_parameter(f, prefix + "norm.", m.norm...);
        Linear<Scalar, P>::each_parameter(f, prefix + "to_q.", m.to_q...);
        Linear<Scalar, P>::each_parameter(f, prefix + "to_kv.", m.to_kv...);
        Linear<Scalar, P>::each_parameter(f, prefix + "to_out.", m.to_out...);
        if constexpr (has_bias)
            RelativeAttentionBias<Scalar, P>::each_parameter(
                f, prefix + (IgnoresNames<F> ? "" : "relative_attention_bias."), m.relative_attention_bias...);
    }

private:
    Index inner() const { return heads * dim_head; }

    /// The bias of one call by distance (h, 2 · span + 1), what the attention takes of it, and the table that its
    /// gradient is added to; NoBias where the logits have none.
    auto bias_by_distance(const P& policy) const {
        if constexpr (has_bias)
            return relative_position_bias(policy, buckets, relative_attention_bias.weight, buckets.max_distance);
        else
            return NoBias{};
    }
    template <typename ByDistance>
    auto bias_of(const ByDistance& by_distance, const Positions& positions) const {
        if constexpr (has_bias)
            return RoutedPositionBias<accumulate_t<Scalar>>{
                {buckets, by_distance.const_view()}, positions.queries, positions.keys, null_kv ? 1 : 0};
        else
            return by_distance;
    }
    static auto bias_gradient(Gradients& gradients) {
        if constexpr (has_bias)
            return gradients.relative_attention_bias.weight.view();
        else
            return NoBias{};
    }

    template <Viewable X, Viewable C>
    void expect_inputs(const X& x, const C& context, KeyMask mask, Scores scores, QueryScores scores_q) const {
        const auto [batch, routes, keys, dim] = context.shape();
        expect_parameters("", x.extent(2));
        expect_shape("context", context.shape(), {x.extent(0), dynamic, dynamic, x.extent(2)});
        if (mask) expect_shape("mask", mask.shape(), {batch, routes, keys});
        if (scores) expect_shape("scores", scores.shape(), {batch, routes, keys});
        if (scores_q) expect_shape("scores_q", scores_q.shape(), {batch, x.extent(1)});
        if (routes < 1 || heads % routes != 0)
            expect_value(false, "routes of context",
                         colt5::detail::concat({"a divisor of ", std::to_string(heads), " heads"}), routes);
    }

    using Projected = Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic>;  // (b, r, k, h / r · 2 · dim_head)

    /// Keys and values as queries see them: those of the tokens, or copies that are multiplied by scores or have a null
    /// key before them.
    struct AttendedKeys {
        Projected scaled;
        KeysWithNull<Scalar, P> with_null;
        View<const Scalar, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv;  // (b, r, k, h / r, 2, dim_head)
        KeyMask mask;
        Scores value_scale;
    };
    AttendedKeys attended_keys(const P& policy, const Projected& kv, KeyMask mask, Scores scores) const {
        AttendedKeys seen{{}, {}, split_kv(kv), mask, scores};
        if (scores && multiply_keys_by_score) {
            seen.scaled = tensor_like(policy, kv);
            assign(policy, seen.scaled, kv * column(scores));
            seen.kv = split_kv(seen.scaled);
            seen.value_scale = {};
        }
        if (null_kv) {
            seen.with_null = with_null_key(policy, seen.kv, null_kv, seen.mask, seen.value_scale);
            seen.kv = seen.with_null.kv.const_view();
            seen.mask = seen.with_null.mask.const_view();
            seen.value_scale = seen.with_null.value_scale.const_view();
        }
        return seen;
    }
    /// q times the scores, or an empty tensor if there are none.
    static TokensTensor<Scalar, P> scaled(const P& policy, const TokensTensor<Scalar, P>& q, QueryScores scores_q) {
        TokensTensor<Scalar, P> out;
        if (!scores_q) return out;
        out = tensor_like(policy, q);
        assign(policy, out, q * column(scores_q));
        return out;
    }

    auto split_q(const TokensTensor<Scalar, P>& q) const {  // (b, n, h, dim_head)
        return q.view().reshape(std::array<Index, 4>{q.extent(0), q.extent(1), heads, dim_head});
    }
    auto split_kv(const Projected& kv) const {  // (b, r, k, h / r, 2, dim_head)
        const auto [batch, routes, keys, width] = kv.shape();
        return kv.view().reshape(std::array<Index, 6>{batch, routes, keys, heads / routes, 2, dim_head});
    }
    /// Queries, and keys and values, as rotary takes them.
    template <typename V>
    auto rows_of_q(const V& q) const {  // (b, n, 1, h, dim_head)
        return q.reshape(std::array<Index, 5>{q.extent(0), q.extent(1), 1, heads, dim_head});
    }
    template <typename V>
    auto rows_of_kv(const V& kv) const {  // (b · r, k, h / r, 2, dim_head)
        const Index routes = kv.extent(1);
        return kv.reshape(std::array<Index, 5>{kv.extent(0) * routes, kv.extent(2), heads / routes, 2, dim_head});
    }
    static MatrixView<const TokenIndex> of_each_route(const TokensView<const TokenIndex>& positions) {  // (b · r, k)
        if (!positions) return {};
        return positions.reshape(std::array{positions.extent(0) * positions.extent(1), positions.extent(2)});
    }
    template <typename T>
    auto merge_q(const T& q) const {  // (b, n, h · dim_head)
        return q.view().reshape(std::array<Index, 3>{q.extent(0), q.extent(1), heads * dim_head});
    }
};

}  // namespace colt5
