// SPDX-License-Identifier: MIT
#pragma once

#include <string>
#include <utility>

#include <colt5/module/config.hpp>
#include <colt5/module/look_back_attention.hpp>
#include <colt5/module/module.hpp>
#include <colt5/module/prefix_attention.hpp>
#include <colt5/op/null_query.hpp>
#include <colt5/op/route_blocks.hpp>
#include <colt5/router/routers.hpp>

namespace colt5 {

/// The autoregressive attention of the reference, version 0.11. **Its outputs depend on later tokens**: which tokens of
/// a window become queries, and with what score, depends on all tokens of the window. So sampling token by token does
/// not compute what training computed. Use it to reproduce the reference, and otherwise ConditionalRoutedAttention with
/// RouterType::causal, which is strictly causal.
///
/// The light branch is LookBackAttention. For the heavy one, a sequence is cut into windows of heavy_window_size. In
/// each but the first, a router chooses queries. They attend to a learned null key and to the tokens that the other
/// router chooses among all tokens before the window, whose values are multiplied by their scores:
///
///     out_i = light(x)_i + score_q,i · heavy(x_q, x_kv of the window, score_kv)_i [i chosen as a query]
///
/// With use_null_q_tokens, tokens after the first window that are not chosen get a learned null query token in place of
/// a heavy output. Keys and values have num_routed_kv routes, as in ConditionalRoutedAttention.
///
/// Memory grows with n, not with n²; see PrefixAttention, which is the heavy branch. The time of the routers grows with
/// n² / heavy_window_size.
template <AutoregressiveAttentionConfig config, typename Scalar, Policy P>
class ConditionalRoutedAutoregressiveAttention
    : public ModuleBase<ConditionalRoutedAutoregressiveAttention<config, Scalar, P>, P> {
    using Base = ModuleBase<ConditionalRoutedAutoregressiveAttention, P>;
    friend Base;
    static constexpr Index window = config.heavy_window_size != 0 ? config.heavy_window_size : config.light_window_size;
    static constexpr Index routes = config.num_routed_kv;
    static_assert(is_module_scalar<Scalar, P>,
                  "colt5: modules compute in float or double, on Cuda also in bfloat16 or float16");
    static_assert(config.dim >= 1, "colt5: AutoregressiveAttentionConfig.dim must be at least 1");
    static_assert(config.num_heavy_tokens_q >= 1 && config.num_heavy_tokens_kv >= 1,
                  "colt5: AutoregressiveAttentionConfig.num_heavy_tokens_q and num_heavy_tokens_kv must be at least 1");
    static_assert(
        detail::is_width(config.light_heads, config.light_dim_head) &&
            detail::is_width(config.heavy_heads, config.heavy_dim_head),
        "colt5: AutoregressiveAttentionConfig: heads and dim_head must be at least 1, their product at most 2^40");
    static_assert(config.light_window_size >= 1 && config.light_window_size <= Index{1} << 29 && window >= 1 &&
                      window <= Index{1} << 29,
                  "colt5: AutoregressiveAttentionConfig.light_window_size and heavy_window_size must be in [1, 2^29]");
    static_assert(routes >= 1 && config.heavy_heads % routes == 0,
                  "colt5: AutoregressiveAttentionConfig.heavy_heads must be divisible by num_routed_kv");
    static_assert(!config.rotary_emb || config.heavy_dim_head % 2 == 0,
                  "colt5: AutoregressiveAttentionConfig.heavy_dim_head must be even for rotary_emb");
    static_assert(!config.router_kwargs.coor_descent.cosine_sim_routing && config.router_kwargs.route_block_size == 0,
                  "colt5: AutoregressiveAttentionConfig.router_kwargs takes no cosine_sim_routing or route_block_size");

public:
    using Tokens = View<const Scalar, dynamic, dynamic, config.dim>;
    using Out = TokensTensor<Scalar, P>;
    using Counts = AttentionCounts;
    static constexpr RouterKwargs router_kwargs = [] {
        RouterKwargs kwargs = config.router_kwargs;
        kwargs.coor_descent.masked_tokens_count = true;
        return kwargs;
    }();
    template <Index num_routing_tokens>
    using RouterOfRoutes = CoordinateDescentRouter<RouterConfig{.dim = config.dim,
                                                                .num_routing_tokens = num_routing_tokens,
                                                                .straight_through = config.router_straight_through,
                                                                .kwargs = router_kwargs},
                                                   Scalar, P>;
    using QRouter = BlockRouter<RouterOfRoutes<1>, window, Scalar, P>;
    using KVRouter = RouterOfRoutes<routes>;
    using Light = LookBackAttention<Scalar, P>;
    using Heavy = HeavyAttention<Scalar, P>;
    using HeavyBranch = PrefixAttention<config, KVRouter, Scalar, P>;
    using Logit = accumulate_t<Scalar>;

    Light light_attn;
    VectorTensor<Scalar, P> null_q_token;  // (d), or empty
    QRouter q_router;
    KVRouter kv_router;
    Heavy heavy_attn;

    struct Gradients {
        using Module = ConditionalRoutedAutoregressiveAttention;
        typename Light::Gradients light_attn;
        VectorTensor<Logit, P> null_q_token;
        typename QRouter::Gradients q_router;
        typename KVRouter::Gradients kv_router;
        typename Heavy::Gradients heavy_attn;
    };

    /// What backward reads. The tokens must outlive the Activations. N is n rounded up to whole windows of both
    /// branches, m the number of heavy windows, q the queries of each.
    struct Activations {
        Out out;                                   // (b, n, d)
        TokensView<const Scalar> tokens;           // (b, n, d)
        Out padded;                                // (b, N, d), if N differs from n
        Tensor<bool, P, dynamic, dynamic> q_mask;  // (b, N): tokens that may be queries
        typename Light::Activations light;
        RouterActivations<QRouter, Scalar, P> routed_q;  // indices, scores (b, 1, m · q)
        typename HeavyBranch::Sizes sizes;
        typename HeavyBranch::Activations heavy;
        ActivationsOrigin origin;

        /// Calls f(prefix + "q_router", Routing): the queries of the windows. Those of the first window have score 0.
        template <typename F>
        void each_routing(F&& f, const std::string& prefix = "") const {
            f(prefix + "q_router", routed_q.routing);
        }
    };

    explicit ConditionalRoutedAutoregressiveAttention(const P& policy, Seeds seeds = {})
        : Base(policy),
          light_attn(policy, seeds, config.dim, config.light_heads, config.light_dim_head, config.light_window_size),
          q_router(policy, seeds),
          kv_router(policy, seeds),
          heavy_attn(policy, seeds, config.dim, config.heavy_heads, config.heavy_dim_head, true, false, {},
                     config.rotary_emb) {
        if constexpr (config.use_null_q_tokens) {
            null_q_token = {policy, {config.dim}};
            fill_normal(policy, null_q_token, static_cast<SeedSequence&>(seeds).next());
        }
    }

    /// tokens (b, n, d)  →  (b, n, d). `out` may hold the tensor to return, which is then written to. Throws ValueError
    /// if there is a mask: all sequences of a batch have n tokens.
    template <Viewable X>
    Out operator()(const X& tokens, Argument<Mask, P> mask = {}, AttentionCounts counts = {}, Out out = {}) const {
        return compute(detail::expect_tokens<Tokens, P>("tokens", tokens, "mask", mask), mask, counts, std::move(out))
            .out;
    }

    /// The same; returns what backward reads, too.
    template <typename X>
    Activations forward(X&& tokens, Kept<Mask, P> mask = {}, AttentionCounts counts = {}, Out out = {}) const {
        return compute(detail::expect_kept_tokens<Tokens, P>("tokens", std::forward<X>(tokens), "mask", mask), mask,
                       counts, std::move(out));
    }

    /// Throws ShapeError, which names the parameter, when one does not fit the configuration.
    void expect_parameters() const {
        q_router.expect_parameters("q_router.");
        kv_router.expect_parameters("kv_router.");
        light_attn.expect_parameters("light_attn.", config.dim);
        if constexpr (config.use_null_q_tokens) expect_shape("", "null_q_token", null_q_token.shape(), {config.dim});
        heavy_attn.expect_parameters("heavy_attn.", config.dim);
    }

    /// The address of a parameter, by which saved activations know their module.
    const void* identity() const { return heavy_attn.to_out.weight.data(); }

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
    Activations compute(const Tokens& tokens, Mask mask, const AttentionCounts& counts, Out given) const {
        expect_value(!mask, "mask", "absent in autoregressive attention", "given");
        const typename HeavyBranch::Sizes of(tokens.shape(), counts);
        expect_parameters();
        const P& policy = this->policy();
        if (given) expect_shape("out", given.shape(), tokens.shape());
        const Index batch = of.batch, length = of.padded();
        Activations saved;
        saved.sizes = of;
        saved.tokens = tokens.const_view();
        saved.origin = ActivationsOrigin(policy, identity(), tokens);
        saved.out = detail::result_like(policy, "out", std::move(given), tokens);
        if (saved.out.size() == 0) return saved;
        const bool pads = length != of.length;
        if (pads) {
            saved.padded = {policy, {batch, length, config.dim}};
            pad_sequences(policy, saved.padded.view(), tokens.const_view(), of.length);
        }
        const auto x = pads ? saved.padded.const_view() : tokens.const_view();  // (b, N, d)
        Out padded_out;
        if (pads) padded_out = tensor_like(policy, x);
        const auto out = pads ? padded_out.view() : saved.out.view();
        saved.light = light_attn.forward(policy, out, x);

        saved.q_mask = {policy, {batch, length}};
        assign(policy, saved.q_mask,
               column_numbers<double>() >= static_cast<double>(window) &&
                   column_numbers<double>() < static_cast<double>(of.length));
        saved.routed_q = q_router.forward(policy, x, saved.q_mask.const_view(), of.windows * of.queries);
        const auto& [indices_q, scores_q] = saved.routed_q.routing;  // (b, 1, m · q)
        const auto at_q = single_route(indices_q);
        saved.heavy = HeavyBranch(heavy_attn, kv_router, of).forward(policy, x, at_q);
        if constexpr (config.use_null_q_tokens)
            add_null_query(policy, out, null_q_token, null_queries(policy, saved, length).const_view());
        scatter(policy, Scatter::add, out, saved.heavy.out, at_q, single_route(scores_q));
        if (pads) crop(policy, saved.out.view(), padded_out);
        return saved;
    }

    template <Viewable D>
    void expect_backward(const Activations& saved, const D& d_out, const Gradients& gradients,
                         const Out& into = {}) const {
        saved.origin.expect(this->policy(), identity(), saved.tokens);
        expect_parameters();
        expect_like<ConditionalRoutedAutoregressiveAttention>("gradients", *this, gradients);
        expect<Tokens, P>("d_out", d_out);
        expect_shape("d_out", d_out.shape(), saved.tokens.shape());
        if (into) expect_shape("d_tokens", into.shape(), saved.tokens.shape());
    }

    /// Returns d_tokens (b, n, d).
    template <typename SomeActivations, Viewable D>
    Out compute_gradients(SomeActivations& saved, const D& d_of_out, Gradients& gradients, Out given = {}) const {
        const P& policy = this->policy();
        detail::release(saved.out);
        if (saved.tokens.size() == 0) return tensor_like(policy, saved.tokens);
        const auto of = saved.sizes;
        const bool pads = static_cast<bool>(saved.padded);
        const auto x = pads ? saved.padded.const_view() : saved.tokens;  // (b, N, d)
        Out padded_d_out;
        if (pads) {
            padded_d_out = tensor_like(policy, x);
            pad_sequences(policy, padded_d_out.view(), TokensView<const Scalar>(d_of_out.const_view()), of.length);
        }
        const auto d_out = pads ? padded_d_out.const_view() : d_of_out.const_view();

        const auto& routing_q = saved.routed_q.routing;
        const auto at_q = single_route(routing_q.indices);
        auto d_heavy = scatter_vjp(policy, Scatter::add, d_out, at_q);  // (b, m · q, d)
        auto d_scores_q = tensor_like(policy, routing_q.scores);
        assign(policy, d_scores_q, row_sum(d_heavy * saved.heavy.out));
        assign(policy, d_heavy, d_heavy * column(routing_q.scores));
        const auto d = HeavyBranch(heavy_attn, kv_router, of)
                           .backward(policy, saved.heavy, detail::if_owned(saved.heavy), std::move(d_heavy), x, at_q,
                                     gradients.heavy_attn);
        const Out d_light =
            light_attn.backward(policy, saved.light, detail::if_owned(saved.light), d_out, x, gradients.light_attn);
        Out d_tokens = detail::result_like(policy, "d_tokens", std::move(given), saved.tokens), padded_d_x;
        if (pads) padded_d_x = tensor_like(policy, x);
        const auto d_x = pads ? padded_d_x.view() : d_tokens.view();
        assign(policy, d_x, d_light + d.d_x);
        route_logits_vjp(policy, d_x, gradients.kv_router.routing_token.view(), d.d_logits, x, kv_router.routing_token,
                         KVRouter::logit_scale);
        q_router.backward(policy, saved.routed_q, d_scores_q.const_view(), x, saved.q_mask.const_view(), d_x,
                          gradients.q_router);
        if constexpr (config.use_null_q_tokens)
            null_query_vjp(policy, gradients.null_q_token.view(), d_out,
                           null_queries(policy, saved, of.padded()).const_view());
        if (pads) crop(policy, d_tokens.view(), padded_d_x);
        return d_tokens;
    }

    template <typename Saved>
    static auto null_queries(const P& policy, const Saved& saved, Index length) {
        return unrouted_tokens(policy, single_route(saved.routed_q.routing.indices), saved.q_mask.const_view(), length);
    }
    /// The first rows of padded sequences.
    static void crop(const P& policy, TokensView<Scalar> out, const TokensTensor<Scalar, P>& padded) {
        for (Index b = 0; b < out.extent(0); ++b)
            assign(policy, out[b], padded.const_view()[b].range(0, out.extent(1)));
    }
};

}  // namespace colt5
