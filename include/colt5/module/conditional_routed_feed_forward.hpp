// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/module/config.hpp>
#include <colt5/module/feed_forward.hpp>
#include <colt5/module/pass.hpp>
#include <colt5/op/clean_padding.hpp>

namespace colt5 {

/// Conditional feedforward (CoLT5, section 3.1): a light feedforward for every token, a heavy one for the tokens that
/// the router chooses, weighted by their scores:
///
///     out_i = light(x_i) + score_i · heavy(x_i) [i chosen]
///
/// Masked tokens get no heavy output; what is not finite in them counts as 0. The router is that of `router_type`, or
/// any template that meets Router.
template <FeedForwardConfig config, typename Scalar, Policy P,
          template <RouterConfig, typename, typename> class RouterTemplate = ConfiguredRouter>
class ConditionalRoutedFeedForward {
    static_assert(is_module_scalar<Scalar, P>,
                  "colt5: modules compute in float or double, on Cuda also in bfloat16 or float16");
    static_assert(config.dim >= 1, "colt5: FeedForwardConfig.dim must be at least 1");
    static_assert(config.num_heavy_tokens >= 1, "colt5: FeedForwardConfig.num_heavy_tokens must be at least 1");
    static_assert(config.dim * config.light_ff_mult >= 1 && config.dim * config.light_ff_mult <= 0x1p40,
                  "colt5: FeedForwardConfig.light_ff_mult times dim must be at least 1 and at most 2^40");
    static_assert(config.dim * config.heavy_ff_mult >= 1 && config.dim * config.heavy_ff_mult <= 0x1p40,
                  "colt5: FeedForwardConfig.heavy_ff_mult times dim must be at least 1 and at most 2^40");

public:
    using Tokens = View<const Scalar, dynamic, dynamic, config.dim>;
    using Out = TokensTensor<Scalar, P>;
    using RouterType = RouterTemplate<RouterConfig{.dim = config.dim,
                                                   .straight_through = config.router_straight_through,
                                                   .router_type = config.router_type,
                                                   .kwargs = config.router_kwargs},
                                      Scalar, P>;
    static_assert(Router<RouterType, Scalar, P>, "colt5: the router template does not meet the Router concept");

    RouterType router;
    FeedForward<Scalar, P> light_ff, heavy_ff;

    struct Gradients {
        using Module = ConditionalRoutedFeedForward;
        typename RouterType::Gradients router;
        typename FeedForward<Scalar, P>::Gradients light_ff, heavy_ff;
    };

    /// What backward reads. The tokens and the mask must outlive it.
    struct Pass {
        Out out;  // (b, n, d)
        TokensView<const Scalar> tokens;
        Out clean_copy;  // of the tokens, if padding was not finite; then `tokens` shows it
        Mask mask;
        Residual residual;
        typename FeedForward<Scalar, P>::Pass light, heavy;
        Out heavy_out;  // (b, k, d), not yet times the score
        decltype(std::declval<const RouterType&>().forward(std::declval<const P&>(), TokensView<const Scalar>(), Mask(),
                                                           Index())) routed;
        PassOrigin origin;

        /// f(prefix + the router's name, Routing) for each router.
        template <typename F>
        void each_routing(F&& f, const std::string& prefix = "") const {
            f(prefix + "router", routed.routing);
        }
    };

    explicit ConditionalRoutedFeedForward(const P& policy, Seed seed = {})
        : ConditionalRoutedFeedForward(policy, SeedSequence(seed)) {}
    ConditionalRoutedFeedForward(const P& policy, SeedSequence&& seeds) : ConditionalRoutedFeedForward(policy, seeds) {}
    ConditionalRoutedFeedForward(const P& policy, SeedSequence& seeds)
        : router(policy, seeds),
          light_ff(policy, seeds, config.dim, static_cast<Index>(config.dim * config.light_ff_mult)),
          heavy_ff(policy, seeds, config.dim, static_cast<Index>(config.dim * config.heavy_ff_mult)),
          policy_(policy) {}

    /// tokens (b, n, d), mask (b, n) or absent  →  (b, n, d), plus the tokens if `residual` says so. Keeps nothing.
    template <Viewable X>
    Out operator()(const X& tokens, Argument<Mask, P> mask = {}, FeedForwardTokens counts = {},
                   Residual residual = Residual::none) const {
        const auto given = detail::expect_tokens<Tokens, P>("tokens", tokens, "mask", mask);
        expect_parameters();
        auto [copy, x] = clean_padding(policy_, given, mask);
        Beside beside(policy_);
        const P& aside = beside.policy();
        const auto routed = router.route(aside, x, mask, num_heavy_tokens(counts));  // indices, scores (b, 1, k)
        const auto indices = single_route(routed.indices);
        auto heavy = heavy_ff(aside, gather(aside, x, indices, to_clean<P>(mask)));  // (b, k, d)
        assign(aside, heavy, heavy * column(routed.scores));
        auto out = tensor_like(policy_, x);  // (b, n, d)
        light_ff.forward(policy_, out.view(), x, false, detail::residual_of(residual, x), to_clean<P>(mask));
        beside.join();
        scatter(policy_, how, out.view(), heavy, indices);
        return out;
    }

    /// The same, with what backward reads.
    template <typename X>
    Pass forward(X&& tokens, Kept<Mask, P> mask = {}, FeedForwardTokens counts = {},
                 Residual residual = Residual::none) const {
        const auto given = detail::expect_kept_tokens<Tokens, P>("tokens", std::forward<X>(tokens), "mask", mask);
        expect_parameters();
        auto [copy, x] = clean_padding(policy_, given, mask);
        Beside beside(policy_);
        const P& aside = beside.policy();
        auto routed = router.forward(aside, x, mask, num_heavy_tokens(counts));  // indices, scores (b, 1, k)
        const auto indices = single_route(routed.routing.indices);
        Out heavy_out(aside, {x.extent(0), indices.extent(1), x.extent(2)});  // (b, k, d)
        auto heavy = heavy_ff.forward(aside, heavy_out.view(), gather(aside, x, indices, to_clean<P>(mask)), true);
        auto out = tensor_like(policy_, x);  // (b, n, d)
        auto light = light_ff.forward(policy_, out.view(), x, !policy_.memory_plan().recompute,
                                      detail::residual_of(residual, x), to_clean<P>(mask));
        beside.join();
        auto scaled = tensor_like(policy_, heavy_out);
        assign(policy_, scaled, heavy_out * column(routed.routing.scores));
        scatter(policy_, how, out.view(), scaled, indices);
        return {std::move(out),    x.const_view(),
                std::move(copy),   mask,
                residual,          std::move(light),
                std::move(heavy),  std::move(heavy_out),
                std::move(routed), PassOrigin(policy_, identity(), x)};
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
        taken.heavy_out = {};
        return backward_light(beside, taken, heavy, d_out, gradients);
    }

    /// Throws ShapeError, which names the parameter, when one does not fit the configuration.
    void expect_parameters() const {
        if constexpr (IsLinearRouter<RouterType>) router.expect_parameters("router.");
        light_ff.expect_parameters("light_ff.", config.dim);
        heavy_ff.expect_parameters("heavy_ff.", config.dim);
    }
    /// Throws ValueError unless forward of this module returned the pass, and nothing has used it up.
    void expect_pass(const Pass& pass) const { pass.origin.expect(policy_, identity(), pass.tokens); }
    /// Whether gradients have the shapes of those that make_gradients() makes.
    bool fits(const Gradients& gradients) const {
        return is_like<RouterType>(router, gradients.router) &&
               is_like<FeedForward<Scalar, P>>(light_ff, gradients.light_ff) &&
               is_like<FeedForward<Scalar, P>>(heavy_ff, gradients.heavy_ff);
    }
    Gradients make_gradients() const { return zeros_like_parameters(policy_, *this); }
    const P& policy() const { return policy_; }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        RouterType::each_parameter(f, prefix + "router.", m.router...);
        FeedForward<Scalar, P>::each_parameter(f, prefix + "light_ff.", m.light_ff...);
        FeedForward<Scalar, P>::each_parameter(f, prefix + "heavy_ff.", m.heavy_ff...);
    }

private:
    const void* identity() const { return light_ff.hidden.weight.data(); }

    /// Before anything is touched.
    template <Viewable D>
    void expect_backward(const Pass& pass, const D& d_out, const Gradients& gradients) const {
        expect_pass(pass);
        expect_parameters();
        if (!fits(gradients)) expect_like<ConditionalRoutedFeedForward>("gradients", *this, gradients);
        expect<Tokens, P>("d_out", d_out);
        expect_shape("d_out", d_out.shape(), pass.tokens.shape());
    }

    struct HeavyGradients {
        Out d_picked;                                    // (b, k, d)
        TokensTensor<accumulate_t<Scalar>, P> d_scores;  // (b, 1, k)
        TokensTensor<accumulate_t<Scalar>, P> d_logits;  // (b, 1, n), if the light branch adds what the router does
    };

    static HeavyGradients heavy_gradients(const P& policy, const Pass& pass) {
        return {tensor_like(policy, pass.heavy_out), tensor_like(policy, pass.routed.routing.scores), {}};
    }

    template <Viewable D>
    void backward_heavy(Beside<P>& beside, const Pass& pass, HeavyGradients& heavy, const D& d_out,
                        Gradients& gradients) const {
        const P& policy = beside.policy();
        const auto& [indices, scores] = pass.routed.routing;
        const auto picks = single_route(indices);
        auto d_heavy = scatter_vjp(policy, how, d_out, picks);  // (b, k, d)
        assign(policy, heavy.d_scores, row_sum(d_heavy * pass.heavy_out));
        if constexpr (routes > 0) {  // the light branch needs it before the rest
            heavy.d_logits = router.d_logits(policy, pass.routed, heavy.d_scores.const_view(), pass.mask);
            beside.mark();
        }
        assign(policy, d_heavy, d_heavy * column(scores));
        heavy_ff.backward(policy, pass.heavy, heavy.d_picked.view(), d_heavy,
                          gather(policy, pass.tokens, picks, to_clean<P>(pass.mask)), gradients.heavy_ff);
    }

    template <Viewable D>
    Out backward_light(Beside<P>& beside, const Pass& pass, const HeavyGradients& heavy, const D& d_out,
                       Gradients& gradients) const {
        SharedGradient<Scalar, P, routes> shared{
            detail::residual_of(pass.residual, d_out), {}, routes > 0 ? &beside : nullptr};
        if constexpr (routes > 0) add_routes(shared, 0, router, heavy.d_logits.const_view(), gradients.router);
        auto d_x = tensor_like(policy_, pass.tokens);
        light_ff.backward(policy_, pass.light, d_x.view(), d_out, pass.tokens, gradients.light_ff, shared,
                          to_clean<P>(pass.mask));
        beside.join();
        gather_vjp(policy_, d_x.view(), heavy.d_picked, single_route(pass.routed.routing.indices));
        if constexpr (routes == 0)
            router.backward(policy_, pass.routed, heavy.d_scores.const_view(), pass.tokens, pass.mask, d_x.view(),
                            gradients.router);
        return d_x;
    }

    static constexpr std::size_t routes = routes_on_the_way<P, RouterType>;
    static constexpr Scatter how = RouterType::picks_repeat ? Scatter::mean : Scatter::add;

    static Index num_heavy_tokens(const FeedForwardTokens& counts) {
        return detail::token_count("num_heavy_tokens", counts.num_heavy_tokens, config.num_heavy_tokens);
    }

    P policy_;
};

}  // namespace colt5
