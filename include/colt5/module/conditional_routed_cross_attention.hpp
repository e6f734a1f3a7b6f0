// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/module/conditioned_routing_tokens.hpp>
#include <colt5/module/config.hpp>
#include <colt5/module/heavy_attention.hpp>
#include <colt5/module/module.hpp>
#include <colt5/op/clean_padding.hpp>
#include <colt5/op/null_query.hpp>
#include <colt5/router/router_view.hpp>

namespace colt5 {

/// Conditional cross attention: routed queries attend to the routed tokens of a context.
///
/// Queries are routed if there are more than num_tokens_q of them, the context if it is longer than num_tokens_kv;
/// otherwise all of them take part. If queries are routed, the output of each is multiplied by its score. Queries that
/// were not chosen get zeros, or with use_null_q_tokens a learned token. Masked queries get zeros; but with
/// use_null_q_tokens and masked_tokens_get_null_q, where queries are routed, masked queries that are not among the
/// picks get the learned token, too. In masked tokens, values that are not finite count as 0.
///
/// Keys and values come from the context. (Version 0.2.3 of the reference gathers them from the queries.) They have
/// kv_routing_tokens routes, each for heads / kv_routing_tokens of the heads. Queries have q_routing_tokens routes, as
/// in ConditionalRoutedAttention. With condition_kv_routing_on_queries, the choice of the context's tokens depends on
/// the queries: see ConditionedRoutingTokens.
template <CrossAttentionConfig config, typename Scalar, Policy P,
          template <RouterConfig, typename, typename> class RouterTemplate = ConfiguredRouter>
class ConditionalRoutedCrossAttention
    : public ModuleBase<ConditionalRoutedCrossAttention<config, Scalar, P, RouterTemplate>, P> {
    using Base = ModuleBase<ConditionalRoutedCrossAttention, P>;
    friend Base;
    static_assert(is_module_scalar<Scalar, P>,
                  "colt5: modules compute in float or double, on Cuda also in bfloat16 or float16");
    static_assert(config.dim >= 1, "colt5: CrossAttentionConfig.dim must be at least 1");
    static_assert(config.num_tokens_q >= 1, "colt5: CrossAttentionConfig.num_tokens_q must be at least 1");
    static_assert(config.num_tokens_kv >= 1, "colt5: CrossAttentionConfig.num_tokens_kv must be at least 1");
    static_assert(detail::is_width(config.heads, config.dim_head),
                  "colt5: CrossAttentionConfig.heads and dim_head must be at least 1, their product at most 2^40");
    static_assert(config.kv_routing_tokens >= 1 && config.heads % config.kv_routing_tokens == 0,
                  "colt5: CrossAttentionConfig.heads must be divisible by kv_routing_tokens");
    static_assert(config.q_routing_tokens >= 1 && config.heads % config.q_routing_tokens == 0,
                  "colt5: CrossAttentionConfig.heads must be divisible by q_routing_tokens");
    static_assert(detail::are_buckets(config.relative_position_num_buckets, config.relative_position_max_distance),
                  "colt5: CrossAttentionConfig.relative_position_num_buckets must be even and at least 4, "
                  "relative_position_max_distance more than a quarter of it and at most 2^20");

public:
    using Tokens = View<const Scalar, dynamic, dynamic, config.dim>;
    using Out = TokensTensor<Scalar, P>;
    using Counts = CrossAttentionCounts;
    template <Index num_routing_tokens, RouterKwargs kwargs = config.router_kwargs>
    using RouterOfRoutes = RouterTemplate<RouterConfig{.dim = config.dim,
                                                       .num_routing_tokens = num_routing_tokens,
                                                       .straight_through = config.router_straight_through,
                                                       .router_type = config.router_type,
                                                       .kwargs = kwargs},
                                          Scalar, P>;
    using QRouter = RouterOfRoutes<config.q_routing_tokens>;
    static constexpr RouterKwargs kv_router_kwargs = [] {
        RouterKwargs kwargs = config.router_kwargs;
        if (config.route_block_size != 0) kwargs.route_block_size = config.route_block_size;
        return kwargs;
    }();
    using KVRouter = RouterOfRoutes<config.kv_routing_tokens, kv_router_kwargs>;
    static_assert(Router<QRouter, Scalar, P>, "colt5: the router template does not meet the Router concept");
    static_assert(!has_unused_picks<QRouter>,
                  "colt5: attention does not take a router that leaves picks unused, such as RouterType::causal");

    using Heavy = HeavyAttention<Scalar, P, config.use_relative_position_bias, false, head_size<P, config.dim_head>>;
    static_assert(!config.condition_kv_routing_on_queries ||
                      IsLinearRouter<decltype(router_of_blocks(std::declval<const KVRouter&>()))>,
                  "colt5: CrossAttentionConfig.condition_kv_routing_on_queries needs a LinearRouter");
    using RoutingTokens = std::conditional_t<config.condition_kv_routing_on_queries,
                                             ConditionedRoutingTokens<Scalar, P>, LearnedRoutingTokens>;

    VectorTensor<Scalar, P> null_q_token;  // (d), or empty
    QRouter q_router;
    KVRouter kv_router;
    Heavy heavy_attn;
    RoutingTokens kv_routing_tokens;  // without parameters unless condition_kv_routing_on_queries

    struct Gradients {
        using Module = ConditionalRoutedCrossAttention;
        VectorTensor<accumulate_t<Scalar>, P> null_q_token;
        typename QRouter::Gradients q_router;
        typename KVRouter::Gradients kv_router;
        typename Heavy::Gradients heavy_attn;
        typename RoutingTokens::Gradients kv_routing_tokens;
    };

    /// The intermediate results and the output. RoutedQ and RoutedKV are what run_router returns: saved activations of
    /// a router, or its Routing alone.
    template <typename RoutedQ, typename RoutedKV>
    struct ActivationsWith {
        Out out;  // (b, n, d)
        TokensView<const Scalar> x, context;
        // Copies with clean padding, or empty; `x` and `context` view the copy if there is one, otherwise the caller's
        // tensor.
        Out clean_x, clean_context;
        Mask mask, context_mask;
        using Logit = accumulate_t<Scalar>;
        std::optional<RoutedQ> routed_q;
        std::optional<RoutedKV> routed_kv;
        Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic> picked_q;   // (b, r, q, d), if queries are routed
        Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic> picked_kv;  // (b, r, kv, d), if the context is routed
        Tensor<bool, P, dynamic, dynamic, dynamic> picked_mask;  // (b, r, kv), if the context is routed and has a mask
        typename Heavy::Activations heavy;
        typename RoutingTokens::Activations kv_routing_tokens;
        ActivationsOrigin origin;

        View<const Scalar, dynamic, dynamic, dynamic, dynamic> queries() const {  // (b, r, q, d)
            return routed_q ? picked_q.const_view() : with_one_route(x);
        }
        View<const Scalar, dynamic, dynamic, dynamic, dynamic> keys() const {  // (b, r, kv, d)
            return routed_kv ? picked_kv.const_view() : with_one_route(context);
        }
        KeyMask key_mask() const {
            if (!context_mask) return {};
            return routed_kv ? KeyMask(picked_mask.const_view()) : KeyMask(with_one_route(context_mask));
        }
        typename Heavy::Positions positions() const {
            typename Heavy::Positions of;
            if (routed_q) of.queries = routed_q->routing.indices.const_view();
            if (routed_kv) of.keys = routed_kv->routing.indices.const_view();
            return of;
        }
        TokensView<const Logit> key_scores() const {
            return routed_kv ? routed_kv->routing.scores.const_view() : TokensView<const Logit>();
        }

        /// Calls f(prefix + the router's name, Routing) for each router that has chosen.
        template <typename F>
        void each_routing(F&& f, const std::string& prefix = "") const {
            if (routed_q) f(prefix + "q_router", routed_q->routing);
            if (routed_kv) f(prefix + "kv_router", routed_kv->routing);
        }
        /// Calls f(prefix + the router's name, RouterView) for each router that has chosen.
        template <typename F>
        void each_router(F&& f, const std::string& prefix = "") const {
            if (routed_q) f(prefix + "q_router", router_view(*routed_q, mask));
            if (routed_kv) f(prefix + "kv_router", router_view(*routed_kv, context_mask));
        }
    };
    /// What backward reads. Queries, context and masks must outlive it.
    using Activations = ActivationsWith<RouterActivations<QRouter, Scalar, P>, RouterActivations<KVRouter, Scalar, P>>;

    struct InputGradients {
        Out d_x;        // (b, n, d)
        Out d_context;  // (b, m, d)
    };

    explicit ConditionalRoutedCrossAttention(const P& policy, Seeds seeds = {})
        : Base(policy),
          q_router(policy, seeds),
          kv_router(policy, seeds),
          heavy_attn(policy, seeds, config.dim, config.heads, config.dim_head, config.use_null_kv,
                     config.multiply_keys_by_score, detail::buckets_of(config)),
          kv_routing_tokens(policy, seeds, config.dim, config.heads, config.dim_head) {
        if constexpr (config.use_null_q_tokens) {
            null_q_token = {policy, {config.dim}};
            fill_normal(policy, null_q_token, static_cast<SeedSequence&>(seeds).next());
        }
    }

    /// x (b, n, d), context (b, m, d), mask (b, n) and context_mask (b, m), each may be absent  →  (b, n, d). `out` may
    /// hold the tensor to return, which is then written to.
    template <Viewable X, Viewable C>
    Out operator()(const X& x, const C& context, Argument<Mask, P> mask = {}, Argument<Mask, P> context_mask = {},
                   CrossAttentionCounts counts = {}, Out out = {}) const {
        return compute<false>(x, context, mask, context_mask, counts, std::move(out)).out;
    }

    /// The same, with what backward reads.
    template <typename X, typename C>
    Activations forward(X&& x, C&& context, Kept<Mask, P> mask = {}, Kept<Mask, P> context_mask = {},
                        CrossAttentionCounts counts = {}, Out out = {}) const {
        detail::expect_kept_tokens<Tokens, P>("x", std::forward<X>(x), "mask", mask);
        detail::expect_kept_tokens<Tokens, P>("context", std::forward<C>(context), "context_mask", context_mask);
        return compute<true>(x, context, mask, context_mask, counts, std::move(out));
    }

    /// Whether gradients have the shapes of those that make_gradients() makes.
    bool fits(const Gradients& gradients) const {
        return gradients.null_q_token.shape() == null_q_token.shape() &&
               is_like<QRouter>(q_router, gradients.q_router) && is_like<KVRouter>(kv_router, gradients.kv_router) &&
               is_like<Heavy>(heavy_attn, gradients.heavy_attn) &&
               is_like<RoutingTokens>(kv_routing_tokens, gradients.kv_routing_tokens);
    }
    /// Throws ShapeError, which names the parameter, when one does not fit the configuration.
    void expect_parameters() const {
        if constexpr (IsLinearRouter<QRouter>) q_router.expect_parameters("q_router.");
        if constexpr (IsLinearRouter<KVRouter>) kv_router.expect_parameters("kv_router.");
        heavy_attn.expect_parameters("heavy_attn.", config.dim);
        kv_routing_tokens.expect_parameters("kv_routing_tokens.", config.dim);
        if constexpr (config.use_null_q_tokens) expect_shape("", "null_q_token", null_q_token.shape(), {config.dim});
    }

    /// The address of a parameter, by which saved activations know their module.
    const void* identity() const { return heavy_attn.to_out.weight.data(); }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        if constexpr (config.use_null_q_tokens) f(name_for<F>(prefix, "null_q_token"), m.null_q_token...);
        QRouter::each_parameter(f, name_for<F>(prefix, "q_router."), m.q_router...);
        KVRouter::each_parameter(f, name_for<F>(prefix, "kv_router."), m.kv_router...);
        Heavy::each_parameter(f, name_for<F>(prefix, "heavy_attn."), m.heavy_attn...);
        RoutingTokens::each_parameter(f, name_for<F>(prefix, "kv_routing_tokens."), m.kv_routing_tokens...);
    }

private:
    /// The tokens that get the null query token (b, n).
    template <typename Indices>
    static auto null_queries(const P& policy, const Indices& indices_q, Mask mask, Index length) {
        return unrouted_tokens(policy, indices_q, config.masked_tokens_get_null_q ? Mask() : mask, length);
    }

    /// Returns Activations with `save`, and otherwise ActivationsWith the Routing of each router alone.
    template <bool save, Viewable X, Viewable C>
    auto compute(const X& x, const C& context, Mask mask, Mask context_mask, const CrossAttentionCounts& counts,
                 Out given) const {
        using Evaluated = Evaluated<accumulate_t<Scalar>, P>;
        std::conditional_t<save, Activations, ActivationsWith<Evaluated, Evaluated>> saved;
        const auto given_x = detail::expect_tokens<Tokens, P>("x", x, "mask", mask);
        const auto given_context = detail::expect_tokens<Tokens, P>("context", context, "context_mask", context_mask);
        expect_shape("context", context.shape(), {x.extent(0), dynamic, config.dim});
        if (given) expect_shape("out", given.shape(), x.shape());
        expect_parameters();
        saved.mask = mask;
        saved.context_mask = context_mask;
        const P& policy = this->policy();
        const Index num_q = detail::token_count("num_tokens_q", counts.num_tokens_q, config.num_tokens_q);
        const Index num_kv = detail::token_count("num_tokens_kv", counts.num_tokens_kv, config.num_tokens_kv);
        saved.x =
            clean(given_x, mask, config.condition_kv_routing_on_queries || given_x.extent(1) <= num_q, saved.clean_x);
        saved.context = clean(given_context, context_mask, given_context.extent(1) <= num_kv, saved.clean_context);
        if (saved.x.extent(1) > num_q) {
            saved.routed_q = run_router<save>(q_router, policy, saved.x, mask, num_q);  // indices, scores (b, r, q)
            saved.picked_q = gather(policy, saved.x, saved.routed_q->routing.indices, mask);  // (b, r, q, d)
        }
        if (saved.context.extent(1) > num_kv) {
            if constexpr (config.condition_kv_routing_on_queries) {
                saved.kv_routing_tokens = kv_routing_tokens.forward(
                    policy, router_of_blocks(kv_router).routing_token.const_view(), saved.x, mask);
                saved.routed_kv = run_router<save>(kv_router, policy, saved.context, context_mask, num_kv,
                                                   saved.kv_routing_tokens.routing_tokens.const_view());
            } else {
                saved.routed_kv = run_router<save>(kv_router, policy, saved.context, context_mask,
                                                   num_kv);  // indices, scores (b, r, kv)
            }
            saved.picked_kv = gather(policy, saved.context, saved.routed_kv->routing.indices,
                                     context_mask);  // (b, r, kv, d)
            saved.picked_mask = gather_mask(policy, context_mask, saved.routed_kv->routing.indices);
        }
        saved.heavy = heavy_attn.forward(policy, saved.queries(), saved.keys(), saved.key_mask(), saved.key_scores(),
                                         {}, saved.positions());
        saved.out = detail::result_like(policy, "out", std::move(given), saved.x);
        if (saved.routed_q) {
            const auto& [indices, scores] = saved.routed_q->routing;
            set_zero(policy, saved.out);
            if constexpr (config.use_null_q_tokens)
                add_null_query(policy, saved.out.view(), null_q_token,
                               null_queries(policy, all_routes(indices), mask, saved.x.extent(1)).const_view());
            scatter(policy, scatter_mode, saved.out.view(), saved.heavy.out, indices, scores);
        } else {
            copy_real(saved.out, saved.heavy.out, mask);
        }
        saved.origin = ActivationsOrigin(policy, identity(), saved.x, saved.context);
        return saved;
    }

    template <Viewable D>
    void expect_backward(const Activations& saved, const D& d_out, const Gradients& gradients,
                         const InputGradients& into = {}) const {
        saved.origin.expect(this->policy(), identity(), saved.x, saved.context);
        expect_parameters();
        if (!fits(gradients)) expect_like<ConditionalRoutedCrossAttention>("gradients", *this, gradients);
        expect<Tokens, P>("d_out", d_out);
        expect_shape("d_out", d_out.shape(), saved.x.shape());
        if (into.d_x) expect_shape("d_x", into.d_x.shape(), saved.x.shape());
        if (into.d_context) expect_shape("d_context", into.d_context.shape(), saved.context.shape());
    }

    template <typename SomeActivations, Viewable D>
    InputGradients compute_gradients(SomeActivations& saved, const D& d_out, Gradients& gradients,
                                     InputGradients inputs = {}) const {
        const P& policy = this->policy();
        detail::release(saved.out);
        Out d_heavy;                                     // (b, r · q, d) or (b, n, d)
        TokensTensor<accumulate_t<Scalar>, P> d_scores;  // (b, r, q)
        if (saved.routed_q) {
            const auto& [indices, scores] = saved.routed_q->routing;
            d_heavy = scatter_vjp(policy, scatter_mode, d_out, indices);
            d_scores = tensor_like(policy, scores);
            assign(policy, d_scores, row_sum(d_heavy * saved.heavy.out));
            assign(policy, d_heavy, d_heavy * column(scores));
            if constexpr (config.use_null_q_tokens)
                null_query_vjp(policy, gradients.null_q_token.view(), d_out,
                               null_queries(policy, all_routes(indices), saved.mask, saved.x.extent(1)).const_view());
        } else {
            d_heavy = tensor_like(policy, d_out);
            copy_real(d_heavy, d_out, saved.mask);
        }
        auto d = heavy_attn.backward(policy, saved.heavy, d_heavy, saved.queries(), saved.keys(), saved.key_mask(),
                                     saved.key_scores(), gradients.heavy_attn, {}, saved.positions());
        inputs.d_context = detail::result_like(policy, "d_context", std::move(inputs.d_context), saved.context);
        if (saved.routed_q) {
            inputs.d_x = detail::result_like(policy, "d_x", std::move(inputs.d_x), saved.x);
            set_zero(policy, inputs.d_x);
            gather_vjp(policy, inputs.d_x.view(), d.d_x, all_routes(saved.routed_q->routing.indices));
            q_router.backward(policy, *saved.routed_q, d_scores.const_view(), saved.x, saved.mask, inputs.d_x.view(),
                              gradients.q_router);
        } else if (inputs.d_x) {
            assign(policy, inputs.d_x, as_expression(d.d_x));
        } else {
            inputs.d_x = std::move(d.d_x);
        }
        if (saved.routed_kv) {
            set_zero(policy, inputs.d_context);
            gather_vjp(policy, inputs.d_context.view(), d.d_context, saved.routed_kv->routing.indices);
            if constexpr (config.condition_kv_routing_on_queries) {
                const auto given = saved.kv_routing_tokens.routing_tokens.const_view();
                TokensTensor<accumulate_t<Scalar>, P> d_given(policy, given.shape());
                set_zero(policy, d_given);
                kv_router.backward(policy, *saved.routed_kv, d.d_scores.const_view(), saved.context, saved.context_mask,
                                   inputs.d_context.view(), gradients.kv_router, given, d_given.view());
                kv_routing_tokens.backward(policy, saved.kv_routing_tokens, d_given.const_view(), saved.x, saved.mask,
                                           gradients.kv_router.routing_token.view(), inputs.d_x.view(),
                                           gradients.kv_routing_tokens);
            } else {
                kv_router.backward(policy, *saved.routed_kv, d.d_scores.const_view(), saved.context, saved.context_mask,
                                   inputs.d_context.view(), gradients.kv_router);
            }
        } else {
            assign(policy, inputs.d_context, d.d_context.view().reshape(saved.context.shape()));
        }
        return inputs;
    }

    /// Returns the tokens with clean padding (see CleanTokens): `copy`, if one is made here, otherwise `tokens`.
    /// A policy that cleans padding as it reads does so in its router and gather kernels. Attention kernels do not
    /// clean. `used_whole` says that such a kernel takes the tokens without gather: the heavy attention, or that of
    /// ConditionedRoutingTokens. Then a copy is made if there is a mask.
    TokensView<const Scalar> clean(const Tokens& tokens, Mask mask, bool used_whole, Out& copy) const {
        if (cleans_as_it_reads<P> && mask && used_whole)
            copy = copy_with_clean_padding(this->policy(), tokens, mask);
        else
            copy = clean_padding(this->policy(), tokens, mask).copy;
        return copy ? copy.const_view() : TokensView<const Scalar>(tokens);
    }

    static constexpr Scatter scatter_mode = QRouter::picks_repeat ? Scatter::mean : Scatter::add;

    /// (b, m, …) seen as (b, 1, m, …)
    template <typename T, Index... E>
    static auto with_one_route(const View<T, E...>& view) {
        std::array<Index, sizeof...(E) + 1> shape{view.extent(0), 1};
        for (std::size_t axis = 1; axis < sizeof...(E); ++axis) shape[axis + 1] = view.extent(axis);
        return view.reshape(shape);
    }

    /// to = from at real tokens, 0 at masked ones
    template <typename From>
    void copy_real(Out& to, const From& from, Mask mask) const {
        if (mask)
            assign(this->policy(), to, select(column(mask), from, accumulate_t<Scalar>(0)));
        else
            assign(this->policy(), to, as_expression(from));
    }
};

}  // namespace colt5
