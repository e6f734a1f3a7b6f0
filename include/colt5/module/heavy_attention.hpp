// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include <colt5/module/layers.hpp>
#include <colt5/op/append_keys.hpp>
#include <colt5/op/causal_key_counts.hpp>
#include <colt5/op/copy_tokens.hpp>
#include <colt5/op/dense_attention.hpp>
#include <colt5/op/null_key.hpp>
#include <colt5/op/rotary.hpp>
#include <colt5/op/swap_first_axes.hpp>
#include <colt5/op/zero.hpp>
#include <colt5/schedule/next_tokens.hpp>

namespace colt5 {

/// The heavy branch of attention: the routed queries attend to all the routed keys and values (the reference's
/// Attention).
///
/// One RMSNorm for queries and context → to_q, to_kv → attention → to_out; no biases in the projections. With several
/// routes, each route's keys and values serve heads / routes of the heads. The rows of to_kv are in the order (route,
/// head in route, key or value, dim_head).
///
/// Queries may have routes, too, as many as keys or another number. The queries of a route go to heads / routes of the
/// heads: to the rows of to_q and the columns of to_out that belong to these heads. So each query of each route has an
/// output of its own. In shapes, r and h / r belong to queries or to keys, whichever the shape is about.
///
/// With a null key, every head has one more learned key and value, which every query attends to (in causal attention
/// every live one) and no mask hides. With `has_bias`, the logits get T5's relative position bias for the positions
/// that queries and keys came from; the bias of the null key is 0. With `rotary_emb`, queries and keys are rotated by
/// these positions; the null key is not. If it is causal, a query attends to the null key and to the keys at its own
/// position or before, see causal_key_counts. `head` is dim_head if it is a head_size of the policy.
template <typename Scalar, Policy P, bool has_bias = false, bool is_causal = false, Index head = dynamic>
struct HeavyAttention {
    /// The positions of queries (b, r, n) and of keys (b, r, k) in the sequences that they were gathered from. If
    /// absent, they are 0, 1, 2, … They are read only for the bias, the rotation and causal attention. For the last,
    /// they must be given; a query that is not live attends to nothing, and no query to a key that is not.
    struct Positions {
        TokensView<const TokenIndex> queries, keys;
        TokensView<const bool> live_queries{}, live_keys{};  // of their shapes; absent: all
    };
    using Scores = TokensView<const accumulate_t<Scalar>>;       // (b, r, k): factors of the values; may be absent
    using QueryScores = MatrixView<const accumulate_t<Scalar>>;  // (b, r · n): factors of the queries; may be absent

    RMSNorm<Scalar, P> norm;
    TokensTensor<Scalar, P> null_kv;  // (2, h, dim_head), or empty
    Linear<Scalar, P> to_q, to_kv, to_out;
    RelativeAttentionBias<Scalar, P> relative_attention_bias;  // empty unless has_bias
    VectorTensor<float, P> inv_freq;                           // (dim_head / 2), or empty without rotary_emb
    Index heads, dim_head;
    bool multiply_keys_by_score;  // whether the scores multiply keys, too, not only values
    RelativePositionBuckets buckets;

    struct Gradients {
        RMSNorm<accumulate_t<Scalar>, P> norm;
        TokensTensor<accumulate_t<Scalar>, P> null_kv;
        Linear<accumulate_t<Scalar>, P> to_q, to_kv, to_out;
        RelativeAttentionBias<accumulate_t<Scalar>, P> relative_attention_bias;
    };
    struct Activations {
        TokensTensor<Scalar, P> out;  // (b, r · n, d)
        TokensTensor<Scalar, P> q;    // (b, r · n, h / r · dim_head), rotated, before scores_q
        Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic> kv;  // (b, r, k, h / r · 2 · dim_head), keys rotated
        DenseAttentionActivations<Scalar, P> attention;            // its output is (b, n, h, dim_head)
    };
    struct InputGradients {
        TokensTensor<Scalar, P> d_x;                                      // (b, r · n, d)
        Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic> d_context;  // (b, r, k, d)
        TokensTensor<accumulate_t<Scalar>, P> d_scores;                   // (b, r, k), if there are scores
        MatrixTensor<accumulate_t<Scalar>, P> d_scores_q{};               // (b, r · n), if there are scores of queries
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

    /// x (b, n, d), or (b, r, n, d) with routes, context (b, r, k, d), mask and scores (b, r, k), scores_q (b, r · n);
    /// the last three may be absent
    template <Viewable X, Viewable C>
    Activations forward(const P& policy, const X& x, const C& context, KeyMask mask, Scores scores,
                        QueryScores scores_q = {}, const Positions& positions = {}) const {
        expect_inputs(x, context, mask, scores, scores_q, positions);
        const auto queries = by_route(x);  // (b, r, n, d)
        const auto [batch, routes, length, dim] = queries.shape();
        TokensTensor<Scalar, P> q(policy, {batch, routes * length, inner() / routes});
        routed_linear(policy, in_routes(q.view(), routes), norm(policy, queries), to_q.weight);
        auto kv = routed_linear(policy, norm(policy, context), to_kv.weight);  // (b, r, k, h / r · 2 · dim_head)
        if (inv_freq) {
            rotary(policy, rows_of_q(q.view(), routes), heads / routes, inv_freq, {of_each_route(positions.queries)});
            rotary(policy, rows_of_kv(kv.view()), 1, inv_freq, {of_each_route(positions.keys)});
        }
        const auto attended_q = attended_queries(policy, q, scores_q, routes);
        const auto seen = attended_keys(policy, kv, mask, scores);
        const auto by_distance = bias_by_distance(policy);
        const auto counts = key_counts(policy, positions);
        auto attended = dense_attention_forward(policy, attended_q.q, seen.kv, seen.mask, seen.value_scale,
                                                bias_of(by_distance, positions, counts));  // (b, n, h, dim_head)
        auto out = output(policy, attended.out, routes);
        return {std::move(out), std::move(q), std::move(kv), std::move(attended)};
    }

    /// The keys and values that queries of later tokens attend to, the null key at their front.
    struct DecodeState : RoutedKeys<Scalar, P> {
        KeyFormat format;
        std::uint64_t multiply_keys_by_score = 0;  // 1 if the keys and values here are times their scores

        using RoutedKeys<Scalar, P>::RoutedKeys;

        template <typename F, typename... States>
        static void each_tensor(F&& f, const std::string& prefix, States&... states) {
            RoutedKeys<Scalar, P>::each_tensor(f, prefix, states...);
            KeyFormat::each_number(f, prefix, states.format...);
            if constexpr (requires { f.state(prefix, states.multiply_keys_by_score...); })
                f.state(prefix + "multiply_keys_by_score", states.multiply_keys_by_score...);
        }
    };
    static constexpr Index decode_bytes(Index batch, Index routes, Index capacity, Index heads, Index dim_head,
                                        bool has_null_key) {
        return DecodeState::bytes(batch, routes, capacity, heads / routes * 2 * dim_head, has_null_key ? 1 : 0);
    }
    /// With room for `capacity` keys of each route.
    DecodeState make_decode_state(const P& policy, Index batch, Index routes, Index capacity) const {
        expect_routes("routes of context", routes);
        const Index width = 2 * inner() / routes;
        DecodeState state(policy, batch, routes, capacity, width, null_kv ? 1 : 0);
        state.format = {heads, dim_head, static_cast<bool>(inv_freq)};
        state.multiply_keys_by_score = multiply_keys_by_score ? 1 : 0;
        if (null_kv) {
            const Projected none(policy, {batch, routes, 0, width});
            const TokensTensor<accumulate_t<Scalar>, P> no_scale(policy, {batch, routes, 0});
            const auto null = with_null_key(policy, split_kv(none), null_kv, {}, no_scale.const_view());
            const auto to_front = [&](auto& to, const auto& from, Index numbers) {
                const auto rows = [&](auto view, Index count) {
                    return view.reshape(std::array{batch * routes, count, numbers});
                };
                copy_tokens(policy, rows(to.view(), capacity + 1), 0, rows(from.const_view(), 1), 0, 1);
            };
            to_front(state.kv, null.kv, width);
            to_front(state.value_scale, null.value_scale, 1);
        }
        return state;
    }

    /// `out` of forward for the next queries x (b, r, n, d) of sequences whose earlier keys `state` has. Adds the keys
    /// and values of context (b, r, k, d) to it first. The branch must be causal.
    template <Viewable X, Viewable C>
    TokensTensor<Scalar, P> decode_next(const P& policy, DecodeState& state, const X& x, const C& context,
                                        Scores scores, QueryScores scores_q, const Positions& positions) const {
        static_assert(is_causal);
        expect_inputs(x, context, {}, scores, scores_q, positions);
        if (context.extent(2) > 0) {
            auto kv = routed_linear(policy, norm(policy, context), to_kv.weight);  // (b, r, k, h / r · 2 · dim_head)
            if (inv_freq) rotary(policy, rows_of_kv(kv.view()), 1, inv_freq, {of_each_route(positions.keys)});
            if (multiply_keys_by_score) assign(policy, kv, kv * column(scores));
            append_keys(policy, state, kv, scores, positions.keys, positions.live_keys);
        }
        const auto queries = by_route(x);  // (b, r, n, d)
        const auto [batch, routes, length, dim] = queries.shape();
        if (length == 0) return {policy, {batch, 0, dim}};
        TokensTensor<Scalar, P> q(policy, {batch, routes * length, inner() / routes});
        routed_linear(policy, in_routes(q.view(), routes), norm(policy, queries), to_q.weight);
        if (inv_freq)
            rotary(policy, rows_of_q(q.view(), routes), heads / routes, inv_freq, {of_each_route(positions.queries)});
        const auto attended_q = attended_queries(policy, q, scores_q, routes);
        const auto by_distance = bias_by_distance(policy);
        const Positions of_all{positions.queries, state.positions.const_view(), positions.live_queries, {}};
        const auto counts = key_counts(policy, of_all);
        const auto attended =
            dense_attention_forward(policy, attended_q.q, split_kv(state.kv), {},
                                    multiply_keys_by_score ? Scores() : state.value_scale.const_view(),
                                    bias_of(by_distance, of_all, counts));  // (b, n, h, dim_head)
        return output(policy, attended.out, routes);
    }

    template <Viewable D, Viewable X, Viewable C>
    InputGradients backward(const P& policy, const Activations& saved, const D& d_out, const X& x, const C& context,
                            KeyMask mask, Scores scores, Gradients& gradients, QueryScores scores_q = {},
                            const Positions& positions = {}) const {
        auto d = input_gradients(policy, saved, scores, scores_q);
        backward(policy, saved, d, d_out, x, context, mask, scores, gradients, scores_q, positions);
        return d;
    }

    /// The same, written to `d`, which input_gradients() returned. So a caller can allocate `d` before tensors that
    /// live less long.
    template <Viewable D, Viewable X, Viewable C>
    void backward(const P& policy, const Activations& saved, InputGradients& d, const D& d_out, const X& x,
                  const C& context, KeyMask mask, Scores scores, Gradients& gradients, QueryScores scores_q = {},
                  const Positions& positions = {}) const {
        expect_inputs(x, context, mask, scores, scores_q, positions);
        expect_like<HeavyAttention>("gradients", *this, gradients);
        const auto queries = by_route(x);  // (b, q_routes, n, d)
        const auto [batch, routes, keys, dim] = context.shape();
        const Index q_routes = queries.extent(1), length = queries.extent(2);
        expect_shape("saved.q", saved.q.shape(), {batch, q_routes * length, inner() / q_routes});
        expect_shape("saved.kv", saved.kv.shape(), {batch, routes, keys, 2 * inner() / routes});
        expect_shape("saved.attention.out", saved.attention.out.shape(), {batch, length, heads, dim_head});
        expect_shape("saved.attention.log_sum_exp", saved.attention.log_sum_exp.shape(), {batch, heads, length});
        expect_shape("d_out", d_out.shape(), {batch, q_routes * length, dim});
        expect_shape("d.d_x", d.d_x.shape(), d_out.shape());
        expect_shape("d.d_context", d.d_context.shape(), context.shape());
        if (scores) expect_shape("d.d_scores", d.d_scores.shape(), scores.shape());
        if (scores_q) expect_shape("d.d_scores_q", d.d_scores_q.shape(), scores_q.shape());
        const auto d_attended = to_out_vjp(policy, d_out, saved.attention.out, q_routes, gradients);
        const auto attended_q = attended_queries(policy, saved.q, scores_q, q_routes);
        const auto seen = attended_keys(policy, saved.kv, mask, scores);
        const auto by_distance = bias_by_distance(policy);
        const auto counts = key_counts(policy, positions);
        auto d_attention = dense_attention_vjp(
            policy, saved.attention, d_attended.view().reshape(saved.attention.out.shape()), attended_q.q, seen.kv,
            seen.mask, seen.value_scale, bias_of(by_distance, positions, counts), bias_gradient(gradients));
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
        if (q_routes > 1)
            d_attention.d_q =
                swap_middle_axes(policy, split(d_attention.d_q, q_routes));  // (b, r, n, h / r · dim_head)
        const auto d_q = d_attention.d_q.view().reshape(saved.q.shape());
        if (scores_q) {
            assign(policy, d.d_scores_q, row_sum(d_q * saved.q));
            assign(policy, d_q, d_q * column(scores_q));
        }
        if (inv_freq) {
            rotary_vjp(policy, rows_of_q(d_q, q_routes), heads / q_routes, inv_freq,
                       {of_each_route(positions.queries)});
            rotary_vjp(policy, rows_of_kv(d_attention.d_kv.view()), 1, inv_freq, {of_each_route(positions.keys)});
        }
        const auto d_context = routed_linear_vjp(policy, d_attention.d_kv.view().reshape(saved.kv.shape()),
                                                 norm(policy, context), to_kv.weight, gradients.to_kv.weight.view());
        const auto d_normed = routed_linear_vjp(policy, in_routes(d_q, q_routes), norm(policy, queries), to_q.weight,
                                                gradients.to_q.weight.view());
        norm.backward(policy, in_routes(d.d_x.view(), q_routes), d_normed, queries, gradients.norm);
        norm.backward(policy, d.d_context.view(), d_context, context, gradients.norm);
    }
    /// Allocates the result of backward.
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
        if (first_of(m...).null_kv) f(name_for<F>(prefix, "null_kv"), m.null_kv...);
        RMSNorm<Scalar, P>::each_parameter(f, name_for<F>(prefix, "norm."), m.norm...);
        Linear<Scalar, P>::each_parameter(f, name_for<F>(prefix, "to_q."), m.to_q...);
        Linear<Scalar, P>::each_parameter(f, name_for<F>(prefix, "to_kv."), m.to_kv...);
        Linear<Scalar, P>::each_parameter(f, name_for<F>(prefix, "to_out."), m.to_out...);
        if constexpr (has_bias)
            RelativeAttentionBias<Scalar, P>::each_parameter(f, name_for<F>(prefix, "relative_attention_bias."),
                                                             m.relative_attention_bias...);
    }

private:
    Index inner() const { return heads * dim_head; }

    /// The bias for each distance from −max_distance to max_distance (h, 2 · max_distance + 1); NoBias without
    /// has_bias.
    auto bias_by_distance(const P& policy) const {
        if constexpr (has_bias)
            return relative_position_bias(policy, buckets, relative_attention_bias.weight, buckets.max_distance);
        else
            return NoBias{};
    }
    /// How many keys each query attends to, the null key included (see causal_key_counts); empty unless it is causal.
    TokensTensor<TokenIndex, P> key_counts([[maybe_unused]] const P& policy,
                                           [[maybe_unused]] const Positions& positions) const {
        if constexpr (is_causal)
            return causal_key_counts(policy, {positions.queries, positions.live_queries},
                                     {positions.keys, positions.live_keys}, null_kv ? 1 : 0);
        else
            return {};
    }
    /// The results of bias_by_distance and key_counts, in the form that dense_attention takes.
    template <typename ByDistance>
    auto bias_of(const ByDistance& by_distance, const Positions& positions,
                 [[maybe_unused]] const TokensTensor<TokenIndex, P>& counts) const {
        const auto bias = [&] {
            if constexpr (has_bias)
                return RoutedPositionBias<accumulate_t<Scalar>>{
                    {buckets, by_distance.const_view()}, positions.queries, positions.keys, null_kv ? 1 : 0};
            else
                return by_distance;
        }();
        if constexpr (is_causal)
            return FirstKeys<std::remove_const_t<decltype(bias)>>{bias, counts.const_view()};
        else
            return bias;
    }
    /// Where dense_attention_vjp adds the gradient of the bias's table.
    static auto bias_gradient(Gradients& gradients) {
        if constexpr (has_bias)
            return gradients.relative_attention_bias.weight.view();
        else
            return NoBias{};
    }

    template <Viewable X, Viewable C>
    void expect_inputs(const X& x, const C& context, KeyMask mask, Scores scores, QueryScores scores_q,
                       const Positions& positions) const {
        const auto [batch, routes, keys, dim] = context.shape();
        const auto [sequences, q_routes, length, width] = by_route(x).shape();
        expect_parameters("", width);
        expect_shape("context", context.shape(), {sequences, dynamic, dynamic, width});
        if (mask) expect_shape("mask", mask.shape(), {batch, routes, keys});
        if (scores) expect_shape("scores", scores.shape(), {batch, routes, keys});
        if (scores_q) expect_shape("scores_q", scores_q.shape(), {batch, q_routes * length});
        if (positions.queries) expect_shape("positions.queries", positions.queries.shape(), {batch, q_routes, length});
        if constexpr (is_causal) expect_shape("positions.keys", positions.keys.shape(), {batch, routes, keys});
        expect_routes("routes of x", q_routes);
        expect_routes("routes of context", routes);
    }
    void expect_routes(const char* name, Index routes) const {
        if (routes < 1 || heads % routes != 0)
            expect_value(false, name, colt5::detail::concat({"a divisor of ", std::to_string(heads), " heads"}),
                         routes);
    }

    /// Projected tokens, such as keys and values (b, r, k, h / r · 2 · dim_head).
    using Projected = Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic>;

    /// The keys and values that attention reads: `kv` is a view of those of the tokens, or of copies that this struct
    /// owns. `scaled` is multiplied by scores, `with_null` has the null key at its front.
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
    /// The queries that attention reads: `q` is a view of those of the tokens, or of copies. `scaled` is multiplied by
    /// scores. `sorted` has the heads of all routes side by side: (b, n, r, h / r · dim_head).
    struct AttendedQueries {
        TokensTensor<Scalar, P> scaled;
        Projected sorted;
        View<const Scalar, dynamic, dynamic, dynamic, head> q;  // (b, n, h, dim_head)
    };
    AttendedQueries attended_queries(const P& policy, const TokensTensor<Scalar, P>& q, QueryScores scores_q,
                                     Index routes) const {
        AttendedQueries seen{{}, {}, {}};
        if (scores_q) {
            seen.scaled = tensor_like(policy, q);
            assign(policy, seen.scaled, q * column(scores_q));
        }
        const auto& scaled = scores_q ? seen.scaled : q;
        if (routes > 1) seen.sorted = swap_middle_axes(policy, in_routes(scaled.const_view(), routes));
        seen.q = routes > 1 ? split_q(seen.sorted) : split_q(scaled);
        return seen;
    }
    /// to_out with the columns of each route's heads as a matrix of their own: (r, d, h / r · dim_head)
    TokensTensor<Scalar, P> swapped_to_out(const P& policy, Index routes) const {
        return swap_first_axes(
            policy, to_out.weight.const_view().reshape(std::array{to_out.weight.extent(0), routes, inner() / routes}));
    }
    /// Adds the gradient of to_out to `gradients`. Returns the gradient of `attended`: its elements are in the order of
    /// (b, n, h, dim_head), its shape is another.
    template <Viewable D>
    Projected to_out_vjp(const P& policy, const D& d_out, const Projected& attended, Index routes,
                         Gradients& gradients) const {
        const auto d_rows = in_routes(d_out.const_view(), routes);
        if (routes == 1)
            return routed_linear_vjp(policy, d_rows, in_routes(merge_q(attended), 1), to_out.weight,
                                     gradients.to_out.weight.view());
        const auto weight = swapped_to_out(policy, routes);
        TokensTensor<accumulate_t<Scalar>, P> d_weight(policy, weight.shape());
        set_zero(policy, d_weight);
        const auto d_attended = routed_linear_vjp(policy, d_rows, swap_middle_axes(policy, split(attended, routes)),
                                                  weight.view().rows(), d_weight.view().rows());
        assign(policy, gradients.to_out.weight,
               gradients.to_out.weight +
                   swap_first_axes(policy, d_weight).view().reshape(gradients.to_out.weight.shape()));
        return swap_middle_axes(policy, d_attended);
    }

    /// (b, r · n, d)
    TokensTensor<Scalar, P> output(const P& policy, const Projected& attended, Index routes) const {
        TokensTensor<Scalar, P> out(policy, {attended.extent(0), routes * attended.extent(1), to_out.weight.extent(0)});
        if (routes == 1)
            linear(policy, out.view(), merge_q(attended), to_out.weight);
        else
            routed_linear(policy, in_routes(out.view(), routes), swap_middle_axes(policy, split(attended, routes)),
                          swapped_to_out(policy, routes).view().rows());
        return out;
    }
    /// Queries (b, n, d) or (b, r, n, d) as (b, r, n, d).
    template <Viewable X>
    static auto by_route(const X& x) {
        if constexpr (X::rank == 4)
            return x.const_view();
        else
            return in_routes(x.const_view(), 1);
    }
    template <typename T>
    static auto in_routes(const TokensView<T>& x, Index routes) {  // (b, r, n, d)
        return x.reshape(std::array<Index, 4>{x.extent(0), routes, x.extent(1) / routes, x.extent(2)});
    }
    /// Rows of all heads, divided among the routes: (b, n, r, h / r · dim_head)
    auto split(const Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic>& q, Index routes) const {
        return q.const_view().reshape(std::array<Index, 4>{q.extent(0), q.extent(1), routes, inner() / routes});
    }
    template <typename Q>
    auto split_q(const Q& q) const {  // (b, n, h, dim_head)
        return View<const Scalar, dynamic, dynamic, dynamic, head>(
            q.const_view().reshape(std::array<Index, 4>{q.extent(0), q.extent(1), heads, dim_head}));
    }
    auto split_kv(const Projected& kv) const {  // (b, r, k, h / r, 2, dim_head)
        const auto [batch, routes, keys, width] = kv.shape();
        return kv.view().reshape(std::array<Index, 6>{batch, routes, keys, heads / routes, 2, dim_head});
    }
    /// Queries, and keys and values, as rotary takes them.
    template <typename V>
    auto rows_of_q(const V& q, Index routes) const {  // (b · r, n, 1, h / r, dim_head)
        return q.reshape(std::array<Index, 5>{q.extent(0) * routes, q.extent(1) / routes, 1, heads / routes, dim_head});
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
