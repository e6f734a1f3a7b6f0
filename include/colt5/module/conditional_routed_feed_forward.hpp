// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/module/config.hpp>
#include <colt5/module/feed_forward.hpp>
#include <colt5/module/module.hpp>
#include <colt5/schedule/side_stream.hpp>

namespace colt5 {

/// Conditional feedforward (CoLT5, section 3.1): a light feedforward for every token, a heavy one for the tokens that
/// the router chooses, weighted by their scores:
///
///     out_i = light(x_i) + score_i · heavy(x_i) [i chosen]
///
/// A router that may choose a token several times gives it the mean of its heavy outputs.
/// Masked tokens get no heavy output; what is not finite in them counts as 0. The router is that of `router_type`, or
/// any template that meets Router.
template <FeedForwardConfig config, typename Scalar, Policy P,
          template <RouterConfig, typename, typename> class RouterTemplate = ConfiguredRouter>
class ConditionalRoutedFeedForward
    : public ModuleBase<ConditionalRoutedFeedForward<config, Scalar, P, RouterTemplate>, P> {
    using Base = ModuleBase<ConditionalRoutedFeedForward, P>;
    friend Base;
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

    /// What backward reads. The tokens and the mask must outlive the Activations.
    struct Activations {
        Out out;  // (b, n, d)
        TokensView<const Scalar> tokens;
        Out clean_copy;  // of the tokens, if padding was not finite; `tokens` is then a view of it
        Mask mask;
        Residual residual;
        typename FeedForward<Scalar, P>::Activations light, heavy;
        Out heavy_out;                                    // (b, k, d), not yet times the score
        RouterActivations<RouterType, Scalar, P> routed;  // indices, scores (b, 1, k)
        ActivationsOrigin origin;

        /// Calls f(prefix + the router's name, Routing) for each router.
        template <typename F>
        void each_routing(F&& f, const std::string& prefix = "") const {
            f(prefix + "router", routed.routing);
        }
    };

    explicit ConditionalRoutedFeedForward(const P& policy, Seeds seeds = {})
        : Base(policy),
          router(policy, seeds),
          light_ff(policy, seeds, config.dim, static_cast<Index>(config.dim * config.light_ff_mult)),
          heavy_ff(policy, seeds, config.dim, static_cast<Index>(config.dim * config.heavy_ff_mult)) {}

    /// tokens (b, n, d), mask (b, n) or absent  →  (b, n, d), plus the tokens if `residual` says so. Saves nothing.
    template <Viewable X>
    Out operator()(const X& tokens, Argument<Mask, P> mask = {}, FeedForwardTokens counts = {},
                   Residual residual = Residual::none) const {
        return compute<false>(detail::expect_tokens<Tokens, P>("tokens", tokens, "mask", mask), mask, counts, residual);
    }

    /// The same, with what backward reads.
    template <typename X>
    Activations forward(X&& tokens, Kept<Mask, P> mask = {}, FeedForwardTokens counts = {},
                        Residual residual = Residual::none) const {
        return compute<true>(detail::expect_kept_tokens<Tokens, P>("tokens", std::forward<X>(tokens), "mask", mask),
                             mask, counts, residual);
    }

    /// Throws ShapeError, which names the parameter, when one does not fit the configuration.
    void expect_parameters() const {
        if constexpr (IsLinearRouter<RouterType>) router.expect_parameters("router.");
        light_ff.expect_parameters("light_ff.", config.dim);
        heavy_ff.expect_parameters("heavy_ff.", config.dim);
    }
    /// Throws ValueError unless forward of this module returned them, and nothing has used them up.
    void expect_saved(const Activations& saved) const { saved.origin.expect(this->policy(), identity(), saved.tokens); }
    /// Whether gradients have the shapes of those that make_gradients() makes.
    bool fits(const Gradients& gradients) const {
        return is_like<RouterType>(router, gradients.router) &&
               is_like<FeedForward<Scalar, P>>(light_ff, gradients.light_ff) &&
               is_like<FeedForward<Scalar, P>>(heavy_ff, gradients.heavy_ff);
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        RouterType::each_parameter(f, prefix + "router.", m.router...);
        FeedForward<Scalar, P>::each_parameter(f, prefix + "light_ff.", m.light_ff...);
        FeedForward<Scalar, P>::each_parameter(f, prefix + "heavy_ff.", m.heavy_ff...);
    }

private:
    const void* identity() const { return light_ff.hidden.weight.data(); }

    /// Returns the output or, with `save`, the Activations.
    template <bool save>
    auto compute(const Tokens& tokens, Mask mask, const FeedForwardTokens& counts, Residual residual) const {
        const Index k = detail::token_count("num_heavy_tokens", counts.num_heavy_tokens, config.num_heavy_tokens);
        expect_parameters();
        const P& policy = this->policy();
        auto [clean_copy, x] = clean_padding(policy, tokens, mask);  // (b, n, d)

        SideStream side_stream(policy);
        const P& side = side_stream.policy();
        auto routed = run_router<save, RouterType, Scalar>(router, side, x, mask, k);
        const auto indices = single_route(routed.routing.indices);           // (b, k)
        const auto scores = single_route(routed.routing.scores);             // (b, k)
        Out heavy_out(side, {x.extent(0), indices.extent(1), x.extent(2)});  // (b, k, d)
        auto heavy = heavy_ff.forward(side, heavy_out.view(), gather(side, x, indices, mask), save);

        auto out = tensor_like(policy, x);  // (b, n, d)
        auto light = light_ff.forward(policy, out.view(), x, save && !policy.memory_plan().recompute,
                                      detail::residual_of(residual, x), mask);
        side_stream.join();
        scatter(policy, scatter_mode, out.view(), heavy_out, indices, scores);  // (b, n, d)
        if constexpr (save)
            return Activations{std::move(out),
                               x.const_view(),
                               std::move(clean_copy),
                               mask,
                               residual,
                               std::move(light),
                               std::move(heavy),
                               std::move(heavy_out),
                               std::move(routed),
                               ActivationsOrigin(policy, identity(), x)};
        else
            return out;
    }

    template <Viewable D>
    void expect_backward(const Activations& saved, const D& d_out, const Gradients& gradients) const {
        expect_saved(saved);
        expect_parameters();
        if (!fits(gradients)) expect_like<ConditionalRoutedFeedForward>("gradients", *this, gradients);
        expect<Tokens, P>("d_out", d_out);
        expect_shape("d_out", d_out.shape(), saved.tokens.shape());
    }

    /// Returns d_tokens (b, n, d).
    template <typename SomeActivations, Viewable D>
    Out compute_gradients(SomeActivations& saved, const D& d_out, Gradients& gradients) const {
        const P& policy = this->policy();
        const auto& routing = saved.routed.routing;
        const auto indices = single_route(routing.indices);  // (b, k)
        SideStream side_stream(policy);
        const P& side = side_stream.policy();
        auto d_picked = tensor_like(side, saved.heavy_out);  // (b, k, d)
        auto d_scores = tensor_like(side, routing.scores);   // (b, 1, k)
        TokensTensor<accumulate_t<Scalar>, P> d_logits;      // (b, 1, n)
        GradientEpilogue<Scalar, P, num_updates> epilogue{detail::residual_of(saved.residual, d_out)};
        detail::release(saved.out);  // d_x takes its memory: what lives longer is allocated above

        auto d_heavy = scatter_vjp(side, scatter_mode, d_out, indices);  // (b, k, d)
        assign(side, d_scores, row_sum(d_heavy * saved.heavy_out));
        if constexpr (num_updates > 0) {  // before the heavy branch, because the light branch's norm waits for it
            d_logits = router.d_logits(side, saved.routed, d_scores.const_view(), saved.mask);
            set_rank_one_updates(epilogue, 0, router, d_logits.const_view(), gradients.router);
            epilogue.ready = side_stream.record_event();
        }
        assign(side, d_heavy, d_heavy * column(routing.scores));  // now of the heavy branch's output
        heavy_ff.backward(side, saved.heavy, d_picked.view(), d_heavy, gather(side, saved.tokens, indices, saved.mask),
                          gradients.heavy_ff);
        d_heavy = {};
        detail::release(saved.heavy);
        detail::release(saved.heavy_out);

        auto d_x = tensor_like(policy, saved.tokens);  // (b, n, d)
        light_ff.backward(policy, saved.light, d_x.view(), d_out, saved.tokens, gradients.light_ff, epilogue,
                          saved.mask);
        side_stream.join();
        gather_vjp(policy, d_x.view(), d_picked, indices);
        if constexpr (num_updates == 0)
            router.backward(policy, saved.routed, d_scores.const_view(), saved.tokens, saved.mask, d_x.view(),
                            gradients.router);
        return d_x;
    }

    static constexpr std::size_t num_updates = rank_one_updates<P, RouterType>;
    static constexpr Scatter scatter_mode = RouterType::picks_repeat ? Scatter::mean : Scatter::add;
};

}  // namespace colt5
