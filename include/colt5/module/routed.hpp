// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <type_traits>
#include <utility>

#include <colt5/module/config.hpp>
#include <colt5/module/module.hpp>
#include <colt5/module/route_order.hpp>
#include <colt5/module/routed_parts.hpp>
#include <colt5/module/token_module.hpp>
#include <colt5/op/gather.hpp>
#include <colt5/router/router_view.hpp>

namespace colt5 {

namespace detail {

/// How Routed calls a branch.
template <typename M, typename Scalar, Policy P>
struct Branch {
    static constexpr bool sees_mask = MapsMaskedTokens<M, Scalar, P>;
    static constexpr bool has_epilogue = HasEpilogue<M, Scalar, P>;

    static typename M::Activations forward(const M& branch, const P& policy, TokensView<Scalar> out,
                                           TokensView<const Scalar> x, Mask mask, bool save) {
        if constexpr (sees_mask)
            return branch.forward(policy, out, x, mask, save);
        else
            return branch.forward(policy, out, x, save);
    }
    static void backward(const M& branch, const P& policy, const typename M::Activations& saved, TokensView<Scalar> d_x,
                         TokensView<const Scalar> d_out, TokensView<const Scalar> x, Mask mask,
                         typename M::Gradients& gradients) {
        if constexpr (sees_mask)
            branch.backward(policy, saved, d_x, d_out, x, mask, gradients);
        else
            branch.backward(policy, saved, d_x, d_out, x, gradients);
    }

    /// The same with a residual, in the branch's own epilogue if it has one.
    static typename M::Activations forward(const M& branch, const P& policy, TokensView<Scalar> out,
                                           TokensView<const Scalar> x, Mask mask, bool save,
                                           TokensView<const Scalar> residual) {
        if constexpr (has_epilogue && sees_mask) {
            return branch.forward(policy, out, x, mask, save, residual);
        } else if constexpr (has_epilogue) {
            return branch.forward(policy, out, x, save, residual, mask);
        } else {
            auto saved = forward(branch, policy, out, x, mask, save);
            if (residual) assign(policy, out, out + residual);
            return saved;
        }
    }
    template <std::size_t updates>
    static void backward(const M& branch, const P& policy, const typename M::Activations& saved, TokensView<Scalar> d_x,
                         TokensView<const Scalar> d_out, TokensView<const Scalar> x, Mask mask,
                         typename M::Gradients& gradients, const GradientEpilogue<Scalar, P, updates>& epilogue) {
        if constexpr (has_epilogue && sees_mask) {
            branch.backward(policy, saved, d_x, d_out, x, mask, gradients, epilogue);
        } else if constexpr (has_epilogue) {
            branch.backward(policy, saved, d_x, d_out, x, gradients, epilogue, mask);
        } else {
            backward(branch, policy, saved, d_x, d_out, x, mask, gradients);
            if (epilogue.d_residual) assign(policy, d_x, d_x + epilogue.d_residual);
        }
    }
};

}  // namespace detail

/// A heavy module for the tokens that a router chooses, and a light one for every token:
///
///     out_i = light(x)_i + Σ_r score_r,i · heavy_r(x of route r)_i [i chosen by route r]
///
/// Heavy and Light are any modules that meet TokenModule; without a Light, tokens that are not chosen get 0, or
/// themselves with Residual::tokens. There is a heavy module for each of num_routes routes, or with shared_heavy one
/// for all of them. A heavy module sees the chosen tokens of one route as a sequence of their own, (b, k, d), and a
/// mask of those if it takes one. The chosen tokens come in the order of the router's indices, or with sequence_order
/// as they stand in the sequence. If a route chooses a token several times, the token gets the mean of score · heavy
/// over these choices. Masked tokens get no heavy output; what is not finite in them counts as 0. The router is that of
/// `router_type`, or any template that meets Router.
template <RoutedConfig config, typename Scalar, Policy P, typename Heavy, typename Light = NoLight<Scalar, P>,
          template <RouterConfig, typename, typename> class RouterTemplate = ConfiguredRouter,
          template <typename, typename, typename> class Parts = RoutedParts>
class Routed : detail::ExpectRouted<config, Scalar, P, Heavy, Light>,
               public ModuleBase<Routed<config, Scalar, P, Heavy, Light, RouterTemplate, Parts>, P>,
               public Parts<RouterTemplate<detail::router_config(config), Scalar, P>, Light,
                            detail::OneOrArray<Heavy, detail::heavy_modules(config)>> {
    using Base = ModuleBase<Routed, P>;
    friend Base;
    static constexpr std::size_t num_routes = static_cast<std::size_t>(config.num_routes);
    static constexpr std::size_t num_heavy = static_cast<std::size_t>(detail::heavy_modules(config));
    using HeavyBranch = detail::Branch<Heavy, Scalar, P>;
    using LightBranch = detail::Branch<Light, Scalar, P>;

public:
    using Tokens = View<const Scalar, dynamic, dynamic, config.dim>;
    using Out = TokensTensor<Scalar, P>;
    using Counts = RoutedCounts;
    using TokenRouter = RouterTemplate<detail::router_config(config), Scalar, P>;
    static_assert(Router<TokenRouter, Scalar, P>, "colt5: the router template does not meet the Router concept");
    static_assert(!has_unused_picks<TokenRouter> || !detail::MapsMaskedTokens<Heavy, Scalar, P>,
                  "colt5: a router that leaves picks unused needs a heavy branch that maps each token alone");
    static_assert(!config.sequence_order || !TokenRouter::picks_repeat,
                  "colt5: RoutedConfig.sequence_order needs a router that chooses a token once at most");
    using Modules = Parts<TokenRouter, Light, detail::OneOrArray<Heavy, detail::heavy_modules(config)>>;

    struct Gradients : Parts<typename TokenRouter::Gradients, typename Light::Gradients,
                             detail::OneOrArray<typename Heavy::Gradients, detail::heavy_modules(config)>> {
        using Module = Routed;
    };

    /// What backward reads of one route.
    struct OfRoute {
        Out out;                                          // (b, k, d), not yet times the score
        Tensor<bool, P, dynamic, dynamic, dynamic> mask;  // (b, 1, k), if there is one and the heavy module takes it
        typename Heavy::Activations heavy;
    };
    /// What backward reads. The tokens and the mask must outlive the Activations.
    struct Activations {
        Out out;  // (b, n, d)
        TokensView<const Scalar> tokens;
        Out clean_copy;  // of the tokens, if padding had to be cleaned; `tokens` is then a view of it
        Mask mask;
        Residual residual;
        typename Light::Activations light;
        std::array<OfRoute, num_routes> heavy;
        RouterActivations<TokenRouter, Scalar, P> routed;  // indices, scores (b, r, k)
        Routing<accumulate_t<Scalar>, P> by_route;         // the same (r, b, k), or empty, see RouteOrder
        ActivationsOrigin origin;

        /// Calls f(prefix + the router's name, Routing) for each router.
        template <typename F>
        void each_routing(F&& f, const std::string& prefix = "") const {
            f(prefix + "router", routed.routing);
        }
        /// Calls f(prefix + the router's name, RouterView) for each router.
        template <typename F>
        void each_router(F&& f, const std::string& prefix = "") const {
            f(prefix + "router", router_view(routed, mask));
        }
    };

    explicit Routed(const P& policy, Seeds seeds = {})
        : Base(policy), Modules{TokenRouter(policy, seeds), Light(policy, seeds), make_heavy(policy, seeds)} {}

    /// tokens (b, n, d), mask (b, n) or absent  →  (b, n, d), plus the tokens if `residual` says so. Saves nothing.
    /// `out` may hold the tensor to return, which is then written to.
    template <Viewable X>
    Out operator()(const X& tokens, Argument<Mask, P> mask = {}, RoutedCounts counts = {},
                   Residual residual = Residual::none, Out out = {}) const {
        return compute<false>(detail::expect_tokens<Tokens, P>("tokens", tokens, "mask", mask), mask, counts, residual,
                              std::move(out));
    }

    /// The same, with what backward reads.
    template <typename X>
    Activations forward(X&& tokens, Kept<Mask, P> mask = {}, RoutedCounts counts = {},
                        Residual residual = Residual::none, Out out = {}) const {
        return compute<true>(detail::expect_kept_tokens<Tokens, P>("tokens", std::forward<X>(tokens), "mask", mask),
                             mask, counts, residual, std::move(out));
    }

    /// Throws ShapeError, which names the parameter, when one does not fit the configuration.
    void expect_parameters() const {
        if constexpr (IsLinearRouter<TokenRouter>) this->router.expect_parameters("router.");
        expect_parameters_of(light_of(*this), std::string(Modules::light_name).append("."));
        for (std::size_t i = 0; i < num_heavy; ++i) expect_parameters_of(heavy_of(*this, i), name_of_heavy(i));
    }
    /// Throws ValueError unless forward of this module returned `saved`, and nothing has moved from it since.
    void expect_saved(const Activations& saved) const { saved.origin.expect(this->policy(), identity(), saved.tokens); }
    /// Whether gradients have the shapes of those that make_gradients() makes.
    bool fits(const Gradients& gradients) const {
        bool all = is_like<TokenRouter>(this->router, gradients.router) && fit(light_of(*this), light_of(gradients));
        for (std::size_t i = 0; i < num_heavy; ++i) all = all && fit(heavy_of(*this, i), heavy_of(gradients, i));
        return all;
    }

    /// Saved activations store this address to tell which module they are of: that of the first parameter found, or one
    /// of the policy if the module has no parameters.
    const void* identity() const {
        if constexpr (requires { this->router.routing_token.data(); }) return this->router.routing_token.data();
        const void* address = nullptr;
        const EachTensor look{[&](const auto& parameter) {
            if (address == nullptr) address = parameter.data();
        }};
        TokenRouter::each_parameter(look, "", this->router);
        if (address == nullptr) Heavy::each_parameter(look, "", heavy_of(*this, 0));
        if (address == nullptr) Light::each_parameter(look, "", light_of(*this));
        return address != nullptr ? address : detail::identity_of(this->policy());
    }

    /// What decode reads of earlier tokens: the router's logits of the last block_size tokens, and how many tokens it
    /// may still choose (the budget of CausalTopK).
    using DecodeState = RouterState<TokenRouter>;
    static constexpr Index model_dim = config.dim;
    /// b · r · ((block_size + 2) · sizeof(accumulate_t<Scalar>) + 32), whatever max_length
    static constexpr Index cache_bytes(Index batch, Index) { return TokenRouter::state_bytes(batch); }
    DecodeState make_decode_state(Index batch, Index) const {
        static_assert(RoutesNext<TokenRouter>, "colt5: decode needs a causal router, such as RouterType::causal");
        static_assert(std::same_as<Light, NoLight<Scalar, P>> || !detail::MapsMaskedTokens<Light, Scalar, P>,
                      "colt5: decode needs a light branch that maps each token alone");
        return this->router.make_state(this->policy(), batch, config.num_heavy_tokens);
    }
    Out decode_next(DecodeState& state, const NextTokens<P>& next, const Tokens& x, Out out,
                    Residual residual = Residual::none) const {
        return compute<false>(x, next.mask(), residual, std::move(out), [&](const P& policy, const auto& tokens) {
            auto picks =
                this->router.route_next(policy, state, tokens, next.mask(), config.num_heavy_tokens);  // (b, r, k)
            return Evaluated<accumulate_t<Scalar>, P>{{std::move(picks.indices), std::move(picks.scores)}};
        });
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        TokenRouter::each_parameter(f, name_for<F>(prefix, "router."), m.router...);
        Light::each_parameter(f, name_for<F>(prefix, Modules::light_name, "."), light_of(m)...);
        for (std::size_t i = 0; i < num_heavy; ++i)
            Heavy::each_parameter(f, name_for<F>(prefix, name_of_heavy(i)), heavy_of(m, i)...);
    }

private:
    /// Of the i-th heavy module: "heavy.", or "heavy.i." where there are several.
    static std::string name_of_heavy(std::size_t i) {
        if (num_heavy == 1) return std::string(Modules::heavy_name).append(".");
        return detail::concat({Modules::heavy_name, ".", std::to_string(i), "."});
    }

    /// The router, the light and the heavy part of a module or of its gradients, whatever Parts calls them.
    template <typename R, typename L, typename H>
    struct PartsOf {
        R& router;
        L& light;
        H& heavy;
    };
    template <typename R, typename L, typename H>
    static PartsOf<R, L, H> parts_of(Parts<R, L, H>& parts) {
        auto& [router, light, heavy] = parts;
        return {router, light, heavy};
    }
    template <typename R, typename L, typename H>
    static PartsOf<const R, const L, const H> parts_of(const Parts<R, L, H>& parts) {
        const auto& [router, light, heavy] = parts;
        return {router, light, heavy};
    }
    template <typename M>
    static auto& light_of(M& m) {
        return parts_of(m).light;
    }
    /// The heavy module of a route, or its gradients.
    template <typename M>
    static auto& heavy_of(M& m, [[maybe_unused]] std::size_t route) {
        auto& heavy = parts_of(m).heavy;
        if constexpr (num_heavy == 1)
            return heavy;
        else
            return heavy[route];
    }

    static auto make_heavy(const P& policy, SeedSequence& seeds) {
        if constexpr (num_heavy == 1)
            return Heavy(policy, seeds);
        else
            return [&]<std::size_t... i>(std::index_sequence<i...>) {
                return std::array{(static_cast<void>(i), Heavy(policy, seeds))...};
            }
        (std::make_index_sequence<num_heavy>{});
    }

    template <typename M>
    static void expect_parameters_of(const M& branch, [[maybe_unused]] const std::string& prefix) {
        if constexpr (requires { branch.expect_parameters(prefix, config.dim); })
            branch.expect_parameters(prefix, config.dim);
        else if constexpr (requires { branch.expect_parameters(); })
            branch.expect_parameters();
    }

    template <typename M>
    static bool fit(const M& branch, const typename M::Gradients& gradients) {
        if constexpr (requires { branch.fits(gradients); })
            return branch.fits(gradients);
        else
            return is_like<M>(branch, gradients);
    }

    /// The tokens that both branches read. A policy that cleans padding as it reads gets the tokens themselves, except
    /// when the light branch has no epilogue: such a branch expects clean padding, so a copy is made.
    static auto clean(const P& policy, const Tokens& tokens, Mask mask) {
        auto clean = clean_padding(policy, tokens, mask);
        if constexpr (!LightBranch::has_epilogue)
            if (cleans_as_it_reads<P> && mask) {
                clean.copy = copy_with_clean_padding(policy, tokens, mask);
                clean.tokens = clean.copy.const_view();
            }
        return clean;
    }

    using Logit = accumulate_t<Scalar>;
    using Order = detail::RouteOrder<config, Logit, P>;

    /// The router's picks in the order of the heavy modules (r, b, k), or nothing where that is the router's own.
    static Routing<Logit, P> rearranged([[maybe_unused]] const P& policy, const Routing<Logit, P>& routing,
                                        [[maybe_unused]] Index length) {
        expect_shape("routing", routing.indices.shape(), {dynamic, config.num_routes, dynamic});
        if constexpr (Order::rearranges)
            return Order::rearranged(policy, routing, length);
        else
            return {};
    }
    /// The part of a route (b, k): of `by_route` (r, b, k), or of `all` (b, 1, k) where nothing is rearranged.
    template <typename T>
    static auto of_route([[maybe_unused]] const T& all, [[maybe_unused]] const T& by_route, std::size_t route) {
        if constexpr (Order::rearranges)
            return by_route.const_view()[static_cast<Index>(route)];
        else
            return single_route(all);
    }

    template <typename X, typename Indices>
    static OfRoute run_heavy(const P& policy, const Heavy& module, const X& x, Mask mask, const Indices& indices,
                             bool save) {
        const auto [batch, picks] = indices.shape();
        OfRoute saved;
        saved.out = {policy, {batch, picks, config.dim}};
        if constexpr (HeavyBranch::sees_mask)
            saved.mask = gather_mask(policy, mask, indices.reshape(std::array<Index, 3>{batch, 1, picks}));
        saved.heavy = HeavyBranch::forward(module, policy, saved.out.view(), gather(policy, x, indices, mask),
                                           mask_of(saved), save);
        return saved;
    }
    static Mask mask_of(const OfRoute& saved) { return saved.mask ? single_route(saved.mask) : Mask(); }

    /// Returns the output or, with `save`, the Activations.
    template <bool save>
    auto compute(const Tokens& tokens, Mask mask, const RoutedCounts& counts, Residual residual, Out given) const {
        const Index k = detail::token_count("num_heavy_tokens", counts.num_heavy_tokens, config.num_heavy_tokens);
        expect_parameters();
        return compute<save>(tokens, mask, residual, std::move(given), [&](const P& policy, const auto& x) {
            return run_router<save, TokenRouter, Scalar>(this->router, policy, x, mask, k);
        });
    }
    /// The same with the result of route(policy, x), which has `.routing` with indices and scores (b, r, k).
    template <bool save, typename Route>
    auto compute(const Tokens& tokens, Mask mask, Residual residual, Out given, const Route& route) const {
        const P& policy = this->policy();
        if (given) expect_shape("out", given.shape(), tokens.shape());
        auto [clean_copy, x] = clean(policy, tokens, mask);  // (b, n, d)

        SideStream side_stream(policy);
        const P& side = side_stream.policy();
        auto routed = route(side, x);                                   // (b, r, k)
        auto by_route = rearranged(side, routed.routing, x.extent(1));  // (r, b, k)
        const auto indices = [&](std::size_t r) { return of_route(routed.routing.indices, by_route.indices, r); };
        std::array<OfRoute, num_routes> of_heavy;
        for (std::size_t r = 0; r < num_routes; ++r)
            of_heavy[r] = run_heavy(side, heavy_of(*this, r), x, mask, indices(r), save);  // (b, k, d)

        auto out = detail::result_like(policy, "out", std::move(given), x);  // (b, n, d)
        const bool save_light = save && !(LightBranch::has_epilogue && policy.memory_plan().recompute);
        auto of_light = LightBranch::forward(light_of(*this), policy, out.view(), x, mask, save_light,
                                             detail::residual_of(residual, x));
        side_stream.join();
        for (std::size_t r = 0; r < num_routes; ++r)
            scatter(policy, scatter_mode, out.view(), of_heavy[r].out, indices(r),
                    of_route(routed.routing.scores, by_route.scores, r));  // (b, n, d)
        if constexpr (save)
            return Activations{std::move(out),
                               x,
                               std::move(clean_copy),
                               mask,
                               residual,
                               std::move(of_light),
                               std::move(of_heavy),
                               std::move(routed),
                               std::move(by_route),
                               ActivationsOrigin(policy, identity(), x)};
        else
            return out;
    }

    template <Viewable D>
    void expect_backward(const Activations& saved, const D& d_out, const Gradients& gradients,
                         const Out& into = {}) const {
        expect_saved(saved);
        expect_parameters();
        if (!fits(gradients)) expect_like<Routed>("gradients", *this, gradients);
        expect<Tokens, P>("d_out", d_out);
        expect_shape("d_out", d_out.shape(), saved.tokens.shape());
        if (into) expect_shape("d_tokens", into.shape(), saved.tokens.shape());
    }

    /// Returns d_tokens (b, n, d).
    template <typename SomeActivations, Viewable D>
    Out compute_gradients(SomeActivations& saved, const D& d_out, Gradients& gradients, Out given = {}) const {
        const P& policy = this->policy();
        const auto& routing = saved.routed.routing;
        const auto indices = [&](std::size_t r) { return of_route(routing.indices, saved.by_route.indices, r); };
        SideStream side_stream(policy);
        const P& side = side_stream.policy();
        std::array<Out, num_routes> d_picked, d_heavy;  // (b, k, d)
        for (std::size_t r = 0; r < num_routes; ++r) d_picked[r] = tensor_like(side, saved.heavy[r].out);
        auto d_scores =
            tensor_like(side, Order::rearranges ? saved.by_route.scores : routing.scores);  // (r, b, k), (b, 1, k)
        TokensTensor<Logit, P> d_logits;                                                    // (b, r, n)
        GradientEpilogue<Scalar, P, num_updates> epilogue{detail::residual_of(saved.residual, d_out)};
        // d_x, allocated below, reuses the memory of saved.out. Large tensors that live until then must not take it, so
        // they are allocated above.
        detail::release(saved.out);

        for (std::size_t r = 0; r < num_routes; ++r) {
            d_heavy[r] = scatter_vjp(side, scatter_mode, d_out, indices(r));
            const Index batch = d_heavy[r].extent(0);
            assign(side, d_scores.view().rows().range(static_cast<Index>(r) * batch, batch),  // (b, k)
                   row_sum(d_heavy[r] * saved.heavy[r].out));
        }
        if constexpr (Order::rearranges)
            d_scores = Order::restored(side, d_scores, saved.by_route.indices, routing, saved.tokens.extent(1));
        if constexpr (num_updates > 0) {  // before the heavy branch, because the light branch's norm waits for it
            d_logits = this->router.d_logits(side, saved.routed, d_scores.const_view(), saved.mask);  // (b, r, n)
            set_rank_one_updates(epilogue, 0, this->router, d_logits.const_view(), gradients.router);
            epilogue.ready = side_stream.record_event();
        }
        for (std::size_t r = 0; r < num_routes; ++r) {
            // From here on, d_heavy is the gradient of what the heavy module returned.
            assign(side, d_heavy[r],
                   d_heavy[r] * column(of_route(routing.scores, saved.by_route.scores, r)));  // (b, k, d)
            HeavyBranch::backward(heavy_of(*this, r), side, saved.heavy[r].heavy, d_picked[r].view(), d_heavy[r],
                                  gather(side, saved.tokens, indices(r), saved.mask), mask_of(saved.heavy[r]),
                                  heavy_of(gradients, r));
            d_heavy[r] = {};
            detail::release(saved.heavy[r]);
        }

        auto d_x = detail::result_like(policy, "d_tokens", std::move(given), saved.tokens);  // (b, n, d)
        LightBranch::backward(light_of(*this), policy, saved.light, d_x.view(), d_out.const_view(), saved.tokens,
                              saved.mask, light_of(gradients), epilogue);
        side_stream.join();
        for (std::size_t r = 0; r < num_routes; ++r) gather_vjp(policy, d_x.view(), d_picked[r], indices(r));
        if constexpr (num_updates == 0)
            this->router.backward(policy, saved.routed, d_scores.const_view(), saved.tokens, saved.mask, d_x.view(),
                                  gradients.router);
        return d_x;
    }

    static constexpr std::size_t num_updates = [] {
        constexpr std::size_t all = rank_one_updates<P, TokenRouter>;
        return detail::HasEpilogue<Light, Scalar, P, all> ? all : 0;
    }();
    static constexpr Scatter scatter_mode = TokenRouter::picks_repeat ? Scatter::mean : Scatter::add;
};

}  // namespace colt5
