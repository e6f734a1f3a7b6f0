// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/module/config.hpp>
#include <colt5/module/heavy_attention.hpp>
#include <colt5/module/light_attention.hpp>
#include <colt5/module/module.hpp>
#include <colt5/module/token_module.hpp>
#include <colt5/module/window_attention.hpp>
#include <colt5/op/null_query.hpp>
#include <colt5/router/router_view.hpp>

namespace colt5 {

/// Conditional attention (CoLT5, section 3.2): local attention for every token; attention among the routed queries and
/// the routed keys and values, weighted by the scores of both:
///
///     out_i = light(x)_i + Σ_r score_q,r,i · heavy_r(x_q,r, x_kv, score_kv)_i [i chosen as a query by route r]
///
/// Keys and values have num_routed_kv routes. Each route chooses its own tokens, for heavy_heads / num_routed_kv of the
/// heads. Queries have num_routed_q routes, which share the heads in the same way. heavy_r is the output of the heads
/// of route r alone: their queries are x_q,r, and they use their own columns of the output projection. With one route
/// all heads have the same queries; with as many routes as heads, each head has queries of its own. If the router may
/// pick a token more than once in a route, the token gets the mean over these picks.
///
/// No query attends to a masked token (MaskedRows::window_mean is an exception of the light branch), and masked tokens
/// get no heavy output. In masked tokens, values that are not finite count as 0. With use_null_q_tokens, each real
/// token that no route has chosen as a query gets a learned null query token in place of a heavy output; with
/// masked_tokens_get_null_q, masked tokens get it, too. The router is that of `router_type`, or an instance of any
/// template that meets Router and leaves no picks unused, or is causal.
///
/// With a causal router, such as RouterType::causal, the whole module is causal: in the heavy branch a query attends
/// only to chosen keys at its own position or before, in the light branch to no later token than itself. So an output
/// depends on its token and those before it alone: whatever later tokens hold changes no bit of it. On the CPU the
/// outputs for the first tokens of a sequence alone are also those for the whole sequence, bit for bit; on a GPU up to
/// rounding. A query that sees no chosen key gets a heavy output of 0, or that of the null key.
template <AttentionConfig config, typename Scalar, Policy P,
          template <RouterConfig, typename, typename> class RouterTemplate = ConfiguredRouter>
class ConditionalRoutedAttention : public ModuleBase<ConditionalRoutedAttention<config, Scalar, P, RouterTemplate>, P> {
    using Base = ModuleBase<ConditionalRoutedAttention, P>;
    friend Base;
    static_assert(is_module_scalar<Scalar, P>,
                  "colt5: modules compute in float or double, on Cuda also in bfloat16 or float16");
    static_assert(config.dim >= 1, "colt5: AttentionConfig.dim must be at least 1");
    static_assert(config.num_heavy_tokens_q >= 1, "colt5: AttentionConfig.num_heavy_tokens_q must be at least 1");
    static_assert(config.num_heavy_tokens_kv >= 1, "colt5: AttentionConfig.num_heavy_tokens_kv must be at least 1");
    static_assert(
        !config.has_light_attn || detail::is_width(config.light_heads, config.light_dim_head),
        "colt5: AttentionConfig.light_heads and light_dim_head must be at least 1, their product at most 2^40");
    static_assert(
        detail::is_width(config.heavy_heads, config.heavy_dim_head),
        "colt5: AttentionConfig.heavy_heads and heavy_dim_head must be at least 1, their product at most 2^40");
    static_assert(!config.has_light_attn || config.light_window_size >= 2,
                  "colt5: AttentionConfig.light_window_size must be at least 2");
    static_assert(config.light_window_size / 2 <= LocalAttention::most_reach,
                  "colt5: AttentionConfig.light_window_size must be at most 2^32");
    static_assert(config.num_routed_kv >= 1 && config.heavy_heads % config.num_routed_kv == 0,
                  "colt5: AttentionConfig.heavy_heads must be divisible by num_routed_kv");
    static_assert(config.num_routed_q >= 1 && config.heavy_heads % config.num_routed_q == 0,
                  "colt5: AttentionConfig.heavy_heads must be divisible by num_routed_q");
    static_assert(detail::are_buckets(config.relative_position_num_buckets, config.relative_position_max_distance),
                  "colt5: AttentionConfig.relative_position_num_buckets must be even and at least 4, "
                  "relative_position_max_distance more than a quarter of it and at most 2^20");
    static_assert(!config.rotary_emb || config.heavy_dim_head % 2 == 0,
                  "colt5: AttentionConfig.heavy_dim_head must be even for rotary_emb");
    static_assert(!config.light_rotary_emb || !config.has_light_attn || config.light_dim_head % 2 == 0,
                  "colt5: AttentionConfig.light_dim_head must be even for light_rotary_emb");
    static_assert(
        !config.has_light_attn || !config.light_in_windows ||
            !(config.use_relative_position_bias || config.light_rotary_emb),
        "colt5: AttentionConfig.use_relative_position_bias and light_rotary_emb are not for light_in_windows");
    static_assert(!config.has_light_attn || !config.light_in_windows ||
                      (config.masked_rows == MaskedRows::zero && !config.attends_to_padding),
                  "colt5: AttentionConfig.masked_rows and attends_to_padding are not for light_in_windows");

public:
    using Tokens = View<const Scalar, dynamic, dynamic, config.dim>;
    using Out = TokensTensor<Scalar, P>;
    using Counts = AttentionCounts;
    template <Index num_routing_tokens>
    using RouterOfRoutes = RouterTemplate<RouterConfig{.dim = config.dim,
                                                       .num_routing_tokens = num_routing_tokens,
                                                       .straight_through = config.router_straight_through,
                                                       .router_type = config.router_type,
                                                       .kwargs = config.router_kwargs},
                                          Scalar, P>;
    using QRouter = RouterOfRoutes<config.num_routed_q>;
    using KVRouter = RouterOfRoutes<config.num_routed_kv>;
    static_assert(Router<QRouter, Scalar, P>, "colt5: the router template does not meet the Router concept");
    /// Whether no output depends on later tokens.
    static constexpr bool is_causal = is_causal_router<QRouter>;
    static_assert(!has_unused_picks<QRouter> || is_causal,
                  "colt5: attention takes a router that leaves picks unused only if it is causal");
    static_assert(!is_causal || !config.has_light_attn || !config.light_in_windows,
                  "colt5: attention in windows is not causal: it does not take RouterType::causal");
    static_assert(!is_causal || (config.masked_rows == MaskedRows::zero && !config.attends_to_padding),
                  "colt5: AttentionConfig.masked_rows and attends_to_padding are not for RouterType::causal");

    using LightOrWindows = std::conditional_t<
        config.light_in_windows, WindowAttention<Scalar, P>,
        LightAttention<Scalar, P, config.use_relative_position_bias, LayerNorm, head_size<P, config.light_dim_head>>>;
    using Light = std::conditional_t<config.has_light_attn, LightOrWindows, NoLight<Scalar, P>>;
    using Heavy =
        HeavyAttention<Scalar, P, config.use_relative_position_bias, is_causal, head_size<P, config.heavy_dim_head>>;

    Light light_attn;
    VectorTensor<Scalar, P> null_q_token;  // (d), or empty
    QRouter q_router;
    KVRouter kv_router;
    Heavy heavy_attn;

    struct Gradients {
        using Module = ConditionalRoutedAttention;
        typename Light::Gradients light_attn;
        VectorTensor<accumulate_t<Scalar>, P> null_q_token;
        typename QRouter::Gradients q_router;
        typename KVRouter::Gradients kv_router;
        typename Heavy::Gradients heavy_attn;
    };

    /// What backward reads. The tokens and the mask must outlive the Activations.
    struct Activations {
        Out out;  // (b, n, d)
        TokensView<const Scalar> tokens;
        Out clean_copy;  // a copy of the tokens, if padding was not finite; `tokens` is then a view of the copy
        Mask mask;
        Residual residual;
        typename Light::Activations light;
        RouterActivations<QRouter, Scalar, P> routed_q;      // indices, scores (b, r, q)
        RouterActivations<KVRouter, Scalar, P> routed_kv;    // indices, scores (b, r, kv)
        Tensor<bool, P, dynamic, dynamic, dynamic> kv_mask;  // (b, r, kv), if there is a mask that hides keys
        typename Heavy::Activations heavy;
        ActivationsOrigin origin;

        /// Calls f(prefix + the router's name, Routing) for each router.
        template <typename F>
        void each_routing(F&& f, const std::string& prefix = "") const {
            f(prefix + "q_router", routed_q.routing);
            f(prefix + "kv_router", routed_kv.routing);
        }
        /// Calls f(prefix + the router's name, RouterView) for each router.
        template <typename F>
        void each_router(F&& f, const std::string& prefix = "") const {
            f(prefix + "q_router", router_view(routed_q, mask));
            f(prefix + "kv_router", router_view(routed_kv, mask));
        }
    };

    explicit ConditionalRoutedAttention(const P& policy, Seeds seeds = {})
        : Base(policy),
          light_attn(make_light(policy, seeds)),
          q_router(policy, seeds),
          kv_router(policy, seeds),
          heavy_attn(policy, seeds, config.dim, config.heavy_heads, config.heavy_dim_head, config.use_null_kv,
                     config.multiply_keys_by_score, detail::buckets_of(config), config.rotary_emb) {
        if constexpr (config.use_null_q_tokens) {
            null_q_token = {policy, {config.dim}};
            fill_normal(policy, null_q_token, static_cast<SeedSequence&>(seeds).next());
        }
    }

    /// tokens (b, n, d), mask (b, n) or absent  →  (b, n, d), plus the tokens if `residual` says so. Saves nothing.
    /// `out` may hold the tensor to return, which is then written to.
    template <Viewable X>
    Out operator()(const X& tokens, Argument<Mask, P> mask = {}, AttentionCounts counts = {},
                   Residual residual = Residual::none, Out out = {}) const {
        return compute<false>(detail::expect_tokens<Tokens, P>("tokens", tokens, "mask", mask), mask, counts, residual,
                              std::move(out));
    }

    /// The same, with what backward reads.
    template <typename X>
    Activations forward(X&& tokens, Kept<Mask, P> mask = {}, AttentionCounts counts = {},
                        Residual residual = Residual::none, Out out = {}) const {
        return compute<true>(detail::expect_kept_tokens<Tokens, P>("tokens", std::forward<X>(tokens), "mask", mask),
                             mask, counts, residual, std::move(out));
    }

    /// Throws ShapeError, which names the parameter, when one does not fit the configuration.
    void expect_parameters() const {
        if constexpr (IsLinearRouter<QRouter>) q_router.expect_parameters("q_router.");
        if constexpr (IsLinearRouter<KVRouter>) kv_router.expect_parameters("kv_router.");
        light_attn.expect_parameters("light_attn.", config.dim);
        if constexpr (config.use_null_q_tokens) expect_shape("", "null_q_token", null_q_token.shape(), {config.dim});
        heavy_attn.expect_parameters("heavy_attn.", config.dim);
    }
    /// Throws ValueError unless forward of this module returned `saved`, and no backward has used it up since.
    void expect_saved(const Activations& saved) const { saved.origin.expect(this->policy(), identity(), saved.tokens); }
    /// Whether gradients have the shapes of those that make_gradients() makes.
    bool fits(const Gradients& gradients) const {
        return is_like<Light>(light_attn, gradients.light_attn) &&
               gradients.null_q_token.shape() == null_q_token.shape() &&
               is_like<QRouter>(q_router, gradients.q_router) && is_like<KVRouter>(kv_router, gradients.kv_router) &&
               is_like<Heavy>(heavy_attn, gradients.heavy_attn);
    }

    /// The address of a parameter, by which saved activations know their module.
    const void* identity() const { return heavy_attn.to_out.weight.data(); }

    /// What decode reads of earlier tokens.
    struct DecodeState {
        DecodeStateOf<Light> light_attn;  // keys and values of the last tokens
        RouterState<QRouter> q_router;    // logits of the last tokens, and the budget
        RouterState<KVRouter> kv_router;  // likewise
        DecodeStateOf<Heavy> heavy_attn;  // keys and values that the router has chosen so far

        template <typename F, typename... States>
        static void each_tensor(F&& f, const std::string& prefix, States&... states) {
            DecodeStateOf<Light>::each_tensor(f, prefix + "light_attn.", states.light_attn...);
            RouterState<QRouter>::each_tensor(f, prefix + "q_router.", states.q_router...);
            RouterState<KVRouter>::each_tensor(f, prefix + "kv_router.", states.kv_router...);
            DecodeStateOf<Heavy>::each_tensor(f, prefix + "heavy_attn.", states.heavy_attn...);
        }
    };
    static constexpr Index model_dim = config.dim;
    /// How many keys and values each route keeps: of all chosen tokens of a sequence of max_length.
    static constexpr Index key_capacity(Index max_length) {
        return KVRouter::capacity(max_length, config.num_heavy_tokens_kv);
    }
    /// The sum of what the parts take: DecodeWindow::rows(max_length) tokens of the light branch, key_capacity(
    /// max_length) tokens of each route of the heavy branch, and what each router takes, see CausalTopKState::bytes.
    static constexpr Index cache_bytes(Index batch, Index max_length) {
        Index bytes = QRouter::state_bytes(batch) + KVRouter::state_bytes(batch) +
                      Heavy::decode_bytes(batch, config.num_routed_kv, key_capacity(max_length), config.heavy_heads,
                                          config.heavy_dim_head, config.use_null_kv);
        if constexpr (config.has_light_attn)
            bytes += Light::decode_bytes(light_attention, config.light_heads, config.light_dim_head, batch, max_length);
        return bytes;
    }
    DecodeState make_decode_state(Index batch, Index max_length) const {
        static_assert(is_causal && RoutesNext<QRouter>,
                      "colt5: decode needs a causal router, such as RouterType::causal");
        const P& policy = this->policy();
        DecodeState state;
        if constexpr (config.has_light_attn) state.light_attn = light_attn.make_decode_state(policy, batch, max_length);
        state.q_router = q_router.make_state(policy, batch, config.num_heavy_tokens_q);
        state.kv_router = kv_router.make_state(policy, batch, config.num_heavy_tokens_kv);
        state.heavy_attn = heavy_attn.make_decode_state(policy, batch, config.num_routed_kv, key_capacity(max_length));
        return state;
    }
    Out decode_next(DecodeState& state, const NextTokens<P>& next, const Tokens& tokens, Out given,
                    Residual residual = Residual::none) const {
        const P& policy = this->policy();
        const Mask mask = next.mask();
        auto [clean_copy, x] = clean_padding(policy, tokens, mask);  // (b, m, d)
        SideStream side_stream(policy);
        const P& side = side_stream.policy();
        const auto q = q_router.route_next(side, state.q_router, x, mask, config.num_heavy_tokens_q);
        const auto kv = kv_router.route_next(side, state.kv_router, x, mask, config.num_heavy_tokens_kv);
        const auto heavy =
            heavy_attn.decode_next(side, state.heavy_attn, gather(side, x, q.indices, mask),  // (b, r, q, d)
                                   gather(side, x, kv.indices, mask),                         // (b, r, kv, d)
                                   kv.scores.const_view(), query_scores(q.scores),
                                   {q.positions.const_view(), kv.positions.const_view(), q.live.const_view(),
                                    kv.live.const_view()});  // (b, r · q, d)

        auto out = detail::result_like(policy, "out", std::move(given), x);  // (b, m, d)
        const auto added = detail::residual_of(residual, x);
        if constexpr (config.has_light_attn)
            light_attn.decode_next(policy, state.light_attn, next, out.view(), x, added);
        else
            light_attn.forward(policy, out.view(), x, mask, false, added);
        side_stream.join();
        if constexpr (config.use_null_q_tokens)
            add_null_query(
                policy, out.view(), null_q_token,
                null_queries(policy, all_routes(q.indices), all_routes(q.live), mask, x.extent(1)).const_view());
        scatter(policy, scatter_mode, out.view(), heavy, q.indices, q.scores);  // (b, m, d)
        return out;
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        if constexpr (config.use_null_q_tokens) f(name_for<F>(prefix, "null_q_token"), m.null_q_token...);
        Light::each_parameter(f, name_for<F>(prefix, "light_attn."), m.light_attn...);
        QRouter::each_parameter(f, name_for<F>(prefix, "q_router."), m.q_router...);
        KVRouter::each_parameter(f, name_for<F>(prefix, "kv_router."), m.kv_router...);
        Heavy::each_parameter(f, name_for<F>(prefix, "heavy_attn."), m.heavy_attn...);
        if constexpr (config.rotary_emb && requires { f.buffer(prefix, m.heavy_attn.inv_freq...); })
            f.buffer(name_for<F>(prefix, "rotary_emb.inv_freq"), m.heavy_attn.inv_freq...);
    }

private:
    static constexpr LocalAttention light_attention{config.light_window_size / 2, config.masked_rows,
                                                    config.attends_to_padding, is_causal};
    static Light make_light(const P& policy, [[maybe_unused]] SeedSequence& seeds) {
        if constexpr (config.has_light_attn && config.light_in_windows)
            return Light(policy, seeds, config.dim, config.light_heads, config.light_dim_head,
                         config.light_window_size);
        else if constexpr (config.has_light_attn)
            return Light(policy, seeds, config.dim, config.light_heads, config.light_dim_head, light_attention,
                         detail::buckets_of(config), config.light_rotary_emb);
        else
            return {};
    }

    /// The tokens that get the null query token (b, n).
    template <typename Routed>
    static auto null_queries(const P& policy, const Routed& routed_q, Mask mask, Index length) {
        Mask live;
        if constexpr (is_causal) live = all_routes(routed_q.live);
        return null_queries(policy, all_routes(routed_q.routing.indices), live, mask, length);
    }
    static auto null_queries(const P& policy, MatrixView<const TokenIndex> indices, Mask live, Mask mask,
                             Index length) {
        return unrouted_tokens(policy, indices, config.masked_tokens_get_null_q ? Mask() : mask, length, live);
    }
    /// Where the picks come from, and which are used.
    template <typename RoutedQ, typename RoutedKV>
    static typename Heavy::Positions positions_of(const RoutedQ& q, const RoutedKV& kv) {
        typename Heavy::Positions positions{q.routing.indices.const_view(), kv.routing.indices.const_view()};
        if constexpr (is_causal) {
            positions.live_queries = q.live.const_view();
            positions.live_keys = kv.live.const_view();
        }
        return positions;
    }
    /// The factors of the heavy branch's queries: (b, r · q), or absent.
    template <typename Scores>
    static auto query_scores(const Scores& scores_q) {
        using View = typename Heavy::QueryScores;
        return config.multiply_queries_by_score ? View(all_routes(scores_q)) : View();
    }

    /// Returns the output or, with `save`, the Activations.
    template <bool save>
    auto compute(const Tokens& tokens, Mask mask, const AttentionCounts& counts, Residual residual, Out given) const {
        const Index num_q =
            detail::token_count("num_heavy_tokens_q", counts.num_heavy_tokens_q, config.num_heavy_tokens_q);
        const Index num_kv =
            detail::token_count("num_heavy_tokens_kv", counts.num_heavy_tokens_kv, config.num_heavy_tokens_kv);
        expect_parameters();
        const P& policy = this->policy();
        if (given) expect_shape("out", given.shape(), tokens.shape());
        auto [clean_copy, x] = clean_padding(policy, tokens, mask);  // (b, n, d)

        // The side stream routes and computes the heavy branch, at the same time as the light branch on the main
        // stream.
        SideStream side_stream(policy);
        const P& side = side_stream.policy();
        constexpr bool run_forward = save || is_causal;  // forward says which picks are live
        auto routed_q = run_router<run_forward, QRouter, Scalar>(q_router, side, x, mask, num_q);
        auto routed_kv = run_router<run_forward, KVRouter, Scalar>(kv_router, side, x, mask, num_kv);
        const auto indices_q = routed_q.routing.indices.const_view();  // (b, r, q)
        const auto& [indices_kv, scores_kv] = routed_kv.routing;
        // (b, r, kv); live picks are no masked tokens
        auto kv_mask = gather_mask(side, is_causal ? Mask() : mask, indices_kv);
        auto heavy =
            heavy_attn.forward(side, gather(side, x, indices_q, mask),  // (b, r, q, d)
                               gather(side, x, indices_kv, mask),       // (b, r, kv, d)
                               kv_mask.const_view(), scores_kv.const_view(), query_scores(routed_q.routing.scores),
                               positions_of(routed_q, routed_kv));  // (b, r · q, d)

        auto out = detail::result_like(policy, "out", std::move(given), x);  // (b, n, d)
        // If the memory plan recomputes, the light branch saves only keys and values, and its backward recomputes the
        // rest.
        auto light = light_attn.forward(policy, out.view(), x, mask, save && !policy.memory_plan().recompute,
                                        detail::residual_of(residual, x));
        side_stream.join();
        if constexpr (config.use_null_q_tokens)
            add_null_query(policy, out.view(), null_q_token,
                           null_queries(policy, routed_q, mask, x.extent(1)).const_view());
        scatter(policy, scatter_mode, out.view(), heavy.out, indices_q, routed_q.routing.scores);  // (b, n, d)
        if constexpr (save)
            return Activations{std::move(out),
                               x.const_view(),
                               std::move(clean_copy),
                               mask,
                               residual,
                               std::move(light),
                               std::move(routed_q),
                               std::move(routed_kv),
                               std::move(kv_mask),
                               std::move(heavy),
                               ActivationsOrigin(policy, identity(), x)};
        else
            return out;
    }

    template <Viewable D>
    void expect_backward(const Activations& saved, const D& d_out, const Gradients& gradients,
                         const Out& into = {}) const {
        expect_saved(saved);
        expect_parameters();
        if (!fits(gradients)) expect_like<ConditionalRoutedAttention>("gradients", *this, gradients);
        expect<Tokens, P>("d_out", d_out);
        expect_shape("d_out", d_out.shape(), saved.tokens.shape());
        if (into) expect_shape("d_tokens", into.shape(), saved.tokens.shape());
    }

    /// Returns d_tokens (b, n, d).
    template <typename SomeActivations, Viewable D>
    Out compute_gradients(SomeActivations& saved, const D& d_out, Gradients& gradients, Out given = {}) const {
        using Logits = TokensTensor<accumulate_t<Scalar>, P>;
        const P& policy = this->policy();
        const auto &routing_q = saved.routed_q.routing, &routing_kv = saved.routed_kv.routing;
        const auto indices_q = routing_q.indices.const_view();  // (b, r, q)
        const auto scores_kv = routing_kv.scores.const_view();  // (b, r, kv)
        SideStream side_stream(policy);
        const P& side = side_stream.policy();
        const auto heavy_scores_q = query_scores(routing_q.scores);  // (b, r · q), or absent
        auto d = heavy_attn.input_gradients(side, saved.heavy, scores_kv, heavy_scores_q);
        auto d_scores_q = tensor_like(side, routing_q.scores);  // (b, r, q)
        Logits d_logits_q, d_logits_kv;                         // (b, r, n)
        GradientEpilogue<Scalar, P, num_updates> epilogue{detail::residual_of(saved.residual, d_out)};
        // The memory of saved.out is for d_x. So d and d_scores_q, which live as long as d_x, were allocated before.
        detail::release(saved.out);

        auto d_heavy = scatter_vjp(side, scatter_mode, d_out, indices_q);  // (b, r · q, d)
        assign(side, d_scores_q, row_sum(d_heavy * saved.heavy.out));
        assign(side, d_heavy, d_heavy * column(routing_q.scores));  // now the gradient of heavy.out
        heavy_attn.backward(side, saved.heavy, d, d_heavy, gather(side, saved.tokens, indices_q, saved.mask),
                            gather(side, saved.tokens, routing_kv.indices, saved.mask), saved.kv_mask.const_view(),
                            scores_kv, gradients.heavy_attn, heavy_scores_q,
                            positions_of(saved.routed_q, saved.routed_kv));
        if constexpr (config.multiply_queries_by_score)
            assign(side, d_scores_q, d_scores_q + d.d_scores_q.const_view().reshape(d_scores_q.shape()));
        if constexpr (num_updates > 0) {
            d_logits_q = q_router.d_logits(side, saved.routed_q, d_scores_q.const_view(), saved.mask);
            d_logits_kv = kv_router.d_logits(side, saved.routed_kv, d.d_scores.const_view(), saved.mask);
            set_rank_one_updates(epilogue, 0, q_router, d_logits_q.const_view(), gradients.q_router);
            set_rank_one_updates(epilogue, static_cast<std::size_t>(config.num_routed_q), kv_router,
                                 d_logits_kv.const_view(), gradients.kv_router);
            epilogue.ready = side_stream.record_event();
        }
        d_heavy = {};
        detail::release(saved.heavy);

        auto d_x = detail::result_like(policy, "d_tokens", std::move(given), saved.tokens);  // (b, n, d)
        light_attn.backward(policy, saved.light, d_x.view(), d_out, saved.tokens, saved.mask, gradients.light_attn,
                            epilogue);
        side_stream.join();
        if constexpr (config.use_null_q_tokens)
            null_query_vjp(policy, gradients.null_q_token.view(), d_out,
                           null_queries(policy, saved.routed_q, saved.mask, d_out.extent(1)).const_view());
        gather_vjp(policy, d_x.view(), d.d_x, all_routes(indices_q));
        gather_vjp(policy, d_x.view(), d.d_context, routing_kv.indices);
        if constexpr (num_updates == 0) {
            kv_router.backward(policy, saved.routed_kv, d.d_scores.const_view(), saved.tokens, saved.mask, d_x.view(),
                               gradients.kv_router);
            q_router.backward(policy, saved.routed_q, d_scores_q.const_view(), saved.tokens, saved.mask, d_x.view(),
                              gradients.q_router);
        }
        return d_x;
    }

    /// If this is not 0, the light branch's backward adds the gradients of the routers' logits to d_x and to the
    /// routing tokens, as that many rank-one updates in its epilogue. If it is 0, backward of each router adds them.
    static constexpr std::size_t num_updates = config.has_light_attn ? rank_one_updates<P, QRouter, KVRouter> : 0;
    static constexpr Scatter scatter_mode = QRouter::picks_repeat ? Scatter::mean : Scatter::add;
};

}  // namespace colt5
