// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/module/config.hpp>
#include <colt5/module/heavy_attention.hpp>
#include <colt5/module/light_attention.hpp>
#include <colt5/module/pass.hpp>
#include <colt5/op/clean_padding.hpp>

namespace colt5 {

/// Conditional attention (CoLT5, section 3.2): local attention for every token; attention among the routed queries and
/// the routed keys and values, weighted by the scores of both:
///
///     out_i = light(x)_i + score_q,i · heavy(x_q, x_kv, score_kv)_i [i chosen as a query]
///
/// Keys and values are routed in num_routed_kv sets, each for its share of the heads. Masked tokens are never attended
/// to and get no heavy output; what is not finite in them counts as 0. The router is that of `router_type`, or any
/// template that meets Router.
template <AttentionConfig config, typename Scalar, Policy P,
          template <RouterConfig, typename, typename> class RouterTemplate = ConfiguredRouter>
class ConditionalRoutedAttention {
    static_assert(is_module_scalar<Scalar, P>,
                  "colt5: modules compute in float or double, on Cuda also in bfloat16 or float16");
    static_assert(config.dim >= 1, "colt5: AttentionConfig.dim must be at least 1");
    static_assert(config.num_heavy_tokens_q >= 1, "colt5: AttentionConfig.num_heavy_tokens_q must be at least 1");
    static_assert(config.num_heavy_tokens_kv >= 1, "colt5: AttentionConfig.num_heavy_tokens_kv must be at least 1");
    static_assert(
        detail::is_width(config.light_heads, config.light_dim_head),
        "colt5: AttentionConfig.light_heads and light_dim_head must be at least 1, their product at most 2^40");
    static_assert(
        detail::is_width(config.heavy_heads, config.heavy_dim_head),
        "colt5: AttentionConfig.heavy_heads and heavy_dim_head must be at least 1, their product at most 2^40");
    static_assert(config.light_window_size >= 2, "colt5: AttentionConfig.light_window_size must be at least 2");
    static_assert(config.light_window_size / 2 <= LocalAttention::most_reach,
                  "colt5: AttentionConfig.light_window_size must be at most 2^32");
    static_assert(config.num_routed_kv >= 1 && config.heavy_heads % config.num_routed_kv == 0,
                  "colt5: AttentionConfig.heavy_heads must be divisible by num_routed_kv");

public:
    using Tokens = View<const Scalar, dynamic, dynamic, config.dim>;
    using Out = TokensTensor<Scalar, P>;
    template <Index num_routing_tokens>
    using RouterOfRoutes = RouterTemplate<RouterConfig{.dim = config.dim,
                                                       .num_routing_tokens = num_routing_tokens,
                                                       .straight_through = config.router_straight_through,
                                                       .router_type = config.router_type,
                                                       .kwargs = config.router_kwargs},
                                          Scalar, P>;
    using QRouter = RouterOfRoutes<1>;
    using KVRouter = RouterOfRoutes<config.num_routed_kv>;
    static_assert(Router<QRouter, Scalar, P>, "colt5: the router template does not meet the Router concept");

    LightAttention<Scalar, P> light_attn;
    QRouter q_router;
    KVRouter kv_router;
    HeavyAttention<Scalar, P> heavy_attn;

    struct Gradients {
        using Module = ConditionalRoutedAttention;
        typename LightAttention<Scalar, P>::Gradients light_attn;
        typename QRouter::Gradients q_router;
        typename KVRouter::Gradients kv_router;
        typename HeavyAttention<Scalar, P>::Gradients heavy_attn;
    };

    /// What backward reads. The tokens and the mask must outlive it.
    struct Pass {
        Out out;  // (b, n, d)
        TokensView<const Scalar> tokens;
        Out clean_copy;  // of the tokens, if padding was not finite; then `tokens` shows it
        Mask mask;
        Residual residual;
        typename LightAttention<Scalar, P>::Pass light;
        decltype(std::declval<const QRouter&>().forward(std::declval<const P&>(), TokensView<const Scalar>(), Mask(),
                                                        Index())) routed_q;
        decltype(std::declval<const KVRouter&>().forward(std::declval<const P&>(), TokensView<const Scalar>(), Mask(),
                                                         Index())) routed_kv;
        Tensor<bool, P, dynamic, dynamic, dynamic> kv_mask;  // (b, r, kv), if there is a mask
        typename HeavyAttention<Scalar, P>::Pass heavy;
        PassOrigin origin;

        /// f(prefix + the router's name, Routing) for each router.
        template <typename F>
        void each_routing(F&& f, const std::string& prefix = "") const {
            f(prefix + "q_router", routed_q.routing);
            f(prefix + "kv_router", routed_kv.routing);
        }
    };

    explicit ConditionalRoutedAttention(const P& policy, Seed seed = {})
        : ConditionalRoutedAttention(policy, SeedSequence(seed)) {}
    ConditionalRoutedAttention(const P& policy, SeedSequence&& seeds) : ConditionalRoutedAttention(policy, seeds) {}
    ConditionalRoutedAttention(const P& policy, SeedSequence& seeds)
        : light_attn(policy, seeds, config.dim, config.light_heads, config.light_dim_head,
                     LocalAttention{config.light_window_size / 2, config.masked_rows}),
          q_router(policy, seeds),
          kv_router(policy, seeds),
          heavy_attn(policy, seeds, config.dim, config.heavy_heads, config.heavy_dim_head),
          policy_(policy) {}

    /// tokens (b, n, d), mask (b, n) or absent  →  (b, n, d), plus the tokens if `residual` says so. Keeps nothing.
    template <Viewable X>
    Out operator()(const X& tokens, Argument<Mask, P> mask = {}, AttentionTokens counts = {},
                   Residual residual = Residual::none) const {
        const auto given = detail::expect_tokens<Tokens, P>("tokens", tokens, "mask", mask);
        expect_parameters();
        auto [copy, x] = clean_padding(policy_, given, mask);
        const Index q = num_q(counts), kv = num_kv(counts);
        Beside beside(policy_);
        const P& aside = beside.policy();
        const auto routed_q = q_router.route(aside, x, mask, q);           // indices, scores (b, 1, q)
        const auto routed_kv = kv_router.route(aside, x, mask, kv);        // indices, scores (b, r, kv)
        const auto queries = single_route(routed_q.indices);               // (b, q)
        const auto kv_mask = gather_mask(aside, mask, routed_kv.indices);  // (b, r, kv)
        auto heavy = heavy_attn.forward(aside, gather(aside, x, queries, to_clean<P>(mask)),
                                        gather(aside, x, routed_kv.indices, to_clean<P>(mask)), kv_mask.const_view(),
                                        routed_kv.scores.const_view());
        assign(aside, heavy.out, heavy.out * column(routed_q.scores));  // (b, q, d)
        auto out = tensor_like(policy_, x);                             // (b, n, d)
        light_attn.forward(policy_, out.view(), x, mask, false, detail::residual_of(residual, x));
        beside.join();
        scatter(policy_, how, out.view(), heavy.out, queries);
        return out;
    }

    /// The same, with what backward reads.
    template <typename X>
    Pass forward(X&& tokens, Kept<Mask, P> mask = {}, AttentionTokens counts = {},
                 Residual residual = Residual::none) const {
        const auto given = detail::expect_kept_tokens<Tokens, P>("tokens", std::forward<X>(tokens), "mask", mask);
        expect_parameters();
        auto [copy, x] = clean_padding(policy_, given, mask);
        const Index q = num_q(counts), kv = num_kv(counts);
        Beside beside(policy_);
        const P& aside = beside.policy();
        auto routed_q = q_router.forward(aside, x, mask, q);                 // indices, scores (b, 1, q)
        auto routed_kv = kv_router.forward(aside, x, mask, kv);              // indices, scores (b, r, kv)
        const auto queries = single_route(routed_q.routing.indices);         // (b, q)
        auto kv_mask = gather_mask(aside, mask, routed_kv.routing.indices);  // (b, r, kv)
        auto heavy = heavy_attn.forward(aside, gather(aside, x, queries, to_clean<P>(mask)),
                                        gather(aside, x, routed_kv.routing.indices, to_clean<P>(mask)),
                                        kv_mask.const_view(), routed_kv.routing.scores.const_view());  // (b, q, d)
        auto out = tensor_like(policy_, x);                                                            // (b, n, d)
        auto light = light_attn.forward(policy_, out.view(), x, mask, !policy_.memory_plan().recompute,
                                        detail::residual_of(residual, x));
        beside.join();
        auto scaled = tensor_like(policy_, heavy.out);
        assign(policy_, scaled, heavy.out * column(routed_q.routing.scores));
        scatter(policy_, how, out.view(), scaled, queries);
        return {std::move(out),
                x.const_view(),
                std::move(copy),
                mask,
                residual,
                std::move(light),
                std::move(routed_q),
                std::move(routed_kv),
                std::move(kv_mask),
                std::move(heavy),
                PassOrigin(policy_, identity(), x)};
    }

    /// Returns d_tokens (b, n, d); adds to the gradients of the parameters.
    template <Viewable D>
    Out backward(const Pass& pass, const D& d_out, Gradients& gradients) const {
        expect_backward(pass, d_out, gradients);
        Beside beside(policy_);
        auto heavy = heavy_gradients(beside.policy(), pass);
        backward_heavy(beside, pass, heavy, d_out, gradients);
        return backward_light(beside, pass, heavy, d_out, gradients);
    }

    /// The same for a pass that is handed over: what has been read is freed on the way, its output first.
    /// d_out must not be that output.
    template <Viewable D>
    Out backward(Pass&& pass, const D& d_out, Gradients& gradients) const {
        expect_backward(pass, d_out, gradients);
        expect_not_output(d_out, pass.out);
        Pass taken = std::move(pass);
        Beside beside(policy_);
        auto heavy = heavy_gradients(beside.policy(), taken);  // before a gap opens, which the result is to fill
        taken.out = {};
        backward_heavy(beside, taken, heavy, d_out, gradients);
        taken.heavy = {};
        return backward_light(beside, taken, heavy, d_out, gradients);
    }

    /// Throws ShapeError, which names the parameter, when one does not fit the configuration.
    void expect_parameters() const {
        if constexpr (IsLinearRouter<QRouter>) q_router.expect_parameters("q_router.");
        if constexpr (IsLinearRouter<KVRouter>) kv_router.expect_parameters("kv_router.");
        light_attn.expect_parameters("light_attn.", config.dim);
        heavy_attn.expect_parameters("heavy_attn.", config.dim);
    }
    /// Throws ValueError unless forward of this module returned the pass, and nothing has used it up.
    void expect_pass(const Pass& pass) const { pass.origin.expect(policy_, identity(), pass.tokens); }
    /// Whether gradients have the shapes of those that make_gradients() makes.
    bool fits(const Gradients& gradients) const {
        return is_like<LightAttention<Scalar, P>>(light_attn, gradients.light_attn) &&
               is_like<QRouter>(q_router, gradients.q_router) && is_like<KVRouter>(kv_router, gradients.kv_router) &&
               is_like<HeavyAttention<Scalar, P>>(heavy_attn, gradients.heavy_attn);
    }
    Gradients make_gradients() const { return zeros_like_parameters(policy_, *this); }
    const P& policy() const { return policy_; }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        LightAttention<Scalar, P>::each_parameter(f, prefix + "light_attn.", m.light_attn...);
        QRouter::each_parameter(f, prefix + "q_router.", m.q_router...);
        KVRouter::each_parameter(f, prefix + "kv_router.", m.kv_router...);
        HeavyAttention<Scalar, P>::each_parameter(f, prefix + "heavy_attn.", m.heavy_attn...);
    }

private:
    const void* identity() const { return light_attn.to_out.weight.data(); }

    /// Before anything is touched.
    template <Viewable D>
    void expect_backward(const Pass& pass, const D& d_out, const Gradients& gradients) const {
        expect_pass(pass);
        expect_parameters();
        if (!fits(gradients)) expect_like<ConditionalRoutedAttention>("gradients", *this, gradients);
        expect<Tokens, P>("d_out", d_out);
        expect_shape("d_out", d_out.shape(), pass.tokens.shape());
    }

    struct HeavyGradients {
        typename HeavyAttention<Scalar, P>::InputGradients d;
        TokensTensor<accumulate_t<Scalar>, P> d_scores_q;  // (b, 1, q)
        // (b, 1, n) and (b, r, n), if the light branch adds what the routers do
        TokensTensor<accumulate_t<Scalar>, P> d_logits_q, d_logits_kv;
    };

    HeavyGradients heavy_gradients(const P& policy, const Pass& pass) const {
        return {heavy_attn.input_gradients(policy, pass.heavy, pass.routed_kv.routing.scores.const_view()),
                tensor_like(policy, pass.routed_q.routing.scores),
                {},
                {}};
    }

    template <Viewable D>
    void backward_heavy(Beside<P>& beside, const Pass& pass, HeavyGradients& heavy, const D& d_out,
                        Gradients& gradients) const {
        const P& policy = beside.policy();
        const auto& routing_q = pass.routed_q.routing;
        const auto& routing_kv = pass.routed_kv.routing;
        const auto queries = single_route(routing_q.indices);
        auto d_heavy = scatter_vjp(policy, how, d_out, queries);  // (b, q, d)
        assign(policy, heavy.d_scores_q, row_sum(d_heavy * pass.heavy.out));
        assign(policy, d_heavy, d_heavy * column(routing_q.scores));
        heavy_attn.backward(policy, pass.heavy, heavy.d, d_heavy,
                            gather(policy, pass.tokens, queries, to_clean<P>(pass.mask)),
                            gather(policy, pass.tokens, routing_kv.indices, to_clean<P>(pass.mask)),
                            pass.kv_mask.const_view(), routing_kv.scores.const_view(), gradients.heavy_attn);
        if constexpr (routes > 0) {
            heavy.d_logits_q = q_router.d_logits(policy, pass.routed_q, heavy.d_scores_q.const_view(), pass.mask);
            heavy.d_logits_kv = kv_router.d_logits(policy, pass.routed_kv, heavy.d.d_scores.const_view(), pass.mask);
            beside.mark();
        }
    }

    template <Viewable D>
    Out backward_light(Beside<P>& beside, const Pass& pass, const HeavyGradients& heavy, const D& d_out,
                       Gradients& gradients) const {
        SharedGradient<Scalar, P, routes> shared{
            detail::residual_of(pass.residual, d_out), {}, routes > 0 ? &beside : nullptr};
        if constexpr (routes > 0) {
            add_routes(shared, 0, q_router, heavy.d_logits_q.const_view(), gradients.q_router);
            add_routes(shared, QRouter::num_routing_tokens, kv_router, heavy.d_logits_kv.const_view(),
                       gradients.kv_router);
        }
        auto d_x = tensor_like(policy_, pass.tokens);
        light_attn.backward(policy_, pass.light, d_x.view(), d_out, pass.tokens, pass.mask, gradients.light_attn,
                            shared);
        beside.join();
        gather_vjp(policy_, d_x.view(), heavy.d.d_x, single_route(pass.routed_q.routing.indices));
        gather_vjp(policy_, d_x.view(), heavy.d.d_context, pass.routed_kv.routing.indices);
        if constexpr (routes == 0) {
            kv_router.backward(policy_, pass.routed_kv, heavy.d.d_scores.const_view(), pass.tokens, pass.mask,
                               d_x.view(), gradients.kv_router);
            q_router.backward(policy_, pass.routed_q, heavy.d_scores_q.const_view(), pass.tokens, pass.mask, d_x.view(),
                              gradients.q_router);
        }
        return d_x;
    }

    static constexpr std::size_t routes = routes_on_the_way<P, QRouter, KVRouter>;
    static constexpr Scatter how = QRouter::picks_repeat ? Scatter::mean : Scatter::add;

    static Index num_q(const AttentionTokens& counts) {
        return detail::token_count("num_heavy_tokens_q", counts.num_heavy_tokens_q, config.num_heavy_tokens_q);
    }
    static Index num_kv(const AttentionTokens& counts) {
        return detail::token_count("num_heavy_tokens_kv", counts.num_heavy_tokens_kv, config.num_heavy_tokens_kv);
    }

    P policy_;
};

}  // namespace colt5
