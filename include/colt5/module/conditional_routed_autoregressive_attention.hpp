// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <numeric>
#include <string>
#include <utility>

#include <colt5/module/config.hpp>
#include <colt5/module/heavy_attention.hpp>
#include <colt5/module/look_back_attention.hpp>
#include <colt5/module/module.hpp>
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
/// Keys and values are computed once for each token; windows hold indices into them, and are processed a few at a time.
/// So memory grows with n · (d + num_heavy_tokens_kv / heavy_window_size), not with n². The time of the routers grows
/// with n² / heavy_window_size.
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
    /// branches, m the number of heavy windows, q and k the queries and keys of each, e = h / r · dim_head.
    struct Activations {
        Out out;                                   // (b, n, d)
        TokensView<const Scalar> tokens;           // (b, n, d)
        Out padded;                                // (b, N, d), if N differs from n
        Tensor<bool, P, dynamic, dynamic> q_mask;  // (b, N): tokens that may be queries
        typename Light::Activations light;
        RouterActivations<QRouter, Scalar, P> routed_q;  // indices, scores (b, 1, m · q)
        TokensTensor<Scalar, P> q;                       // (b, r · m · q, e), rotated
        TokensTensor<Scalar, P> kv;                      // (b, r · (N + 1), 2 · e), keys rotated, null ones last
        TokensTensor<Logit, P> logits_kv;                // (b, r, N)
        TokensTensor<TokenIndex, P> indices_kv;          // (b · r · m, 1, k)
        KeysOfWindows<Logit, P> keys;                    // the same with the null keys, and scores
        TokensTensor<Scalar, P> attended;                // (b, r · m · q, e)
        TokensTensor<Logit, P> log_sum_exp;              // (b · r, m, h / r · q)
        Out heavy;                                       // (b, m · q, d)
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

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        if constexpr (config.use_null_q_tokens) f(prefix + "null_q_token", m.null_q_token...);
        Light::each_parameter(f, prefix + "light_attn.", m.light_attn...);
        QRouter::each_parameter(f, prefix + "q_router.", m.q_router...);
        KVRouter::each_parameter(f, prefix + "kv_router.", m.kv_router...);
        Heavy::each_parameter(f, prefix + "heavy_attn.", m.heavy_attn...);
        if constexpr (config.rotary_emb && requires { f.buffer(prefix, m.heavy_attn.inv_freq...); })
            f.buffer(prefix + "rotary_emb.inv_freq", m.heavy_attn.inv_freq...);
    }

private:
    static constexpr Index heads = config.heavy_heads, dim_head = config.heavy_dim_head, inner = heads * dim_head,
                           per_route = heads / routes, width = per_route * dim_head;
    using Four = Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic>;

    /// The sizes of a call. The windows of all sequences and routes are numbered (b, r, m).
    struct Sizes {
        Index batch, length, windows, queries, keys;

        Index padded() const { return windows * window; }
        Index sequences() const { return batch * routes; }
    };
    static Sizes sizes_of(const std::array<Index, 3>& shape, const AttentionCounts& counts) {
        constexpr Index step = std::lcm(window, config.light_window_size);  // whole windows of both branches
        const Index length = shape[1], windows = (length + step - 1) / step * (step / window);
        const Index q = detail::token_count("num_heavy_tokens_q", counts.num_heavy_tokens_q, config.num_heavy_tokens_q);
        const Index kv =
            detail::token_count("num_heavy_tokens_kv", counts.num_heavy_tokens_kv, config.num_heavy_tokens_kv);
        return {shape[0], length, windows, std::min(q, window), std::min(kv, windows * window)};
    }
    /// Rows [first, first + count) of a tensor as (count, 1, columns).
    template <typename T>
    static TokensView<T> rows_of(T* all, Index first, Index count, Index columns) {
        return TokensView<T>::unchecked(all + first * columns, {count, 1, columns});
    }
    /// Calls f(prefixes, first, count) for all windows, as many at a time as have logits of 16 MiB in float.
    template <typename F>
    static void each_routed(const P& policy, const Sizes& of, const TokensTensor<Logit, P>& logits, const F& f) {
        const Index at_once = std::max((Index{1} << 22) / of.padded(), Index{1}), all = of.sequences() * of.windows;
        for (Index first = 0; first < all; first += at_once) {
            const Index count = std::min(at_once, all - first);
            f(window_prefixes(policy, logits.const_view().reshape(std::array{of.sequences(), of.padded()}), window,
                              first, count),
              first, count);
        }
    }

    /// Some windows of one sequence and route: their parts of the tensors of a call.
    struct Part {
        Index sequence, first, count;  // the first window among all, and how many
        Sizes of;

        /// Queries or outputs (count, q, h / r, dim_head) of a tensor (b, r · m · q, e).
        template <typename T>
        View<T, dynamic, dynamic, dynamic, dynamic> queries(T* all) const {
            return View<T, dynamic, dynamic, dynamic, dynamic>::unchecked(all + first * of.queries * width,
                                                                          {count, of.queries, per_route, dim_head});
        }
        template <typename T>
        TokensView<T> log_sum_exp(T* all) const {  // (count, h / r, q)
            return TokensView<T>::unchecked(all + first * per_route * of.queries, {count, per_route, of.queries});
        }
        /// The rows of these windows in a tensor with a number for each key (count, 1, k + 1).
        template <typename T>
        TokensView<T> keys(T* all) const {
            return rows_of(all, first, count, of.keys + 1);
        }
        /// Keys and values of all tokens and the null key (1, N + 1, 2 · e).
        template <typename T>
        TokensView<T> tokens(T* kv) const {
            const Index rows = of.padded() + 1;
            return TokensView<T>::unchecked(kv + sequence * rows * 2 * width, {1, rows, 2 * width});
        }
        auto flat(const TokensTensor<TokenIndex, P>& indices) const {  // (1, count · (k + 1))
            return keys(indices.data()).reshape(std::array{Index{1}, count * (of.keys + 1)});
        }
        auto keys_shape() const { return std::array<Index, 6>{count, 1, of.keys + 1, per_route, 2, dim_head}; }
    };
    /// Calls f(Part) for all windows. A Part has so many that the keys and values that it gathers take about twice as
    /// much memory as those of all tokens of a sequence, or less.
    template <typename F>
    static void each_part(const Sizes& of, const F& f) {
        const Index at_once = std::clamp(2 * routes * of.padded() / of.keys, Index{1}, of.windows);
        for (Index s = 0; s < of.sequences(); ++s)
            for (Index first = 0; first < of.windows; first += at_once)
                f(Part{s, s * of.windows + first, std::min(at_once, of.windows - first), of});
    }

    /// The null key and value of each head, in the layout of kv: (1, h, 2, dim_head)
    auto null_rows(const P& policy) const {
        return swap_middle_axes(policy,
                                heavy_attn.null_kv.const_view().reshape(std::array<Index, 4>{1, 2, heads, dim_head}));
    }
    template <typename T>
    static auto by_route_row(T& null) {  // (r, 2 · e)
        return null.view().reshape(std::array<Index, 2>{routes, 2 * width});
    }
    /// The row of the null key (1, 2 · e) in a tensor (b, r · (N + 1), 2 · e).
    template <typename T>
    static MatrixView<T> null_row(T* kv, const Sizes& of, Index sequence) {
        return MatrixView<T>::unchecked(kv + ((sequence + 1) * (of.padded() + 1) - 1) * 2 * width, {1, 2 * width});
    }

    /// Rows (b, n, r · e) as (b, r · n, e), sorted by route, and back.
    static TokensTensor<Scalar, P> by_route(const P& policy, TokensTensor<Scalar, P> x) {
        const auto [batch, length, all] = x.shape();
        return swapped(policy, std::move(x), length, routes, {batch, routes * length, all / routes});
    }
    static TokensTensor<Scalar, P> by_token(const P& policy, TokensTensor<Scalar, P> x) {
        const auto [batch, rows, each] = x.shape();
        return swapped(policy, std::move(x), routes, rows / routes, {batch, rows / routes, routes * each});
    }
    /// x seen as (b, rows, columns, e), with these two axes swapped, in this shape.
    static TokensTensor<Scalar, P> swapped(const P& policy, TokensTensor<Scalar, P> x, Index rows, Index columns,
                                           const std::array<Index, 3>& shape) {
        if constexpr (routes == 1) return x;
        const Index batch = x.extent(0), each = shape[2] * shape[1] / (rows * columns);
        TokensTensor<Scalar, P> y(policy, shape);
        swap_first_axes_kernel(policy, y.view().reshape(std::array{batch, columns, rows, each}),
                               x.const_view().reshape(std::array{batch, rows, columns, each}));
        return y;
    }
    auto heads_of_q(TokensView<Scalar> q) const {  // (b, m · q, 1, h, dim_head)
        return q.reshape(std::array<Index, 5>{q.extent(0), q.extent(1), 1, heads, dim_head});
    }
    auto heads_of_kv(TokensView<Scalar> kv) const {  // (b, N, h, 2, dim_head)
        return kv.reshape(std::array<Index, 5>{kv.extent(0), kv.extent(1), heads, 2, dim_head});
    }

    Activations compute(const Tokens& tokens, Mask mask, const AttentionCounts& counts, Out given) const {
        expect_value(!mask, "mask", "absent in autoregressive attention", "given");
        const Sizes of = sizes_of(tokens.shape(), counts);
        expect_parameters();
        const P& policy = this->policy();
        if (given) expect_shape("out", given.shape(), tokens.shape());
        const Index batch = of.batch, length = of.padded(), rows = of.windows * of.queries;
        Activations saved;
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
        saved.routed_q = q_router.forward(policy, x, saved.q_mask.const_view(), rows);
        const auto& [indices_q, scores_q] = saved.routed_q.routing;  // (b, 1, m · q)
        const auto at_q = single_route(indices_q);
        const auto normed = heavy_attn.norm(policy, x);  // (b, N, d)
        auto q = linear(policy, gather(policy, normed, at_q), heavy_attn.to_q.weight);
        auto kv = linear(policy, normed, heavy_attn.to_kv.weight);  // (b, N, 2 · r · e)
        if constexpr (config.rotary_emb) {
            rotary(policy, heads_of_q(q.view()), heads, heavy_attn.inv_freq, {at_q});
            rotary(policy, heads_of_kv(kv.view()), 1, heavy_attn.inv_freq, {});
        }
        saved.q = by_route(policy, std::move(q));
        TokensTensor<Scalar, P> with_null(policy, {batch, length + 1, 2 * inner});
        pad_sequences(policy, with_null.view(), TokensView<const Scalar>(kv.const_view()), length);
        kv = {};
        saved.kv = by_route(policy, std::move(with_null));
        const auto null = null_rows(policy);
        for (Index s = 0; s < of.sequences(); ++s)
            assign(policy, null_row(saved.kv.data(), of, s), by_route_row(null).range(s % routes, 1));
        saved.logits_kv = route_logits(policy, x, kv_router.routing_token, KVRouter::logit_scale);
        const Index all_windows = of.sequences() * of.windows;
        const std::array<Index, 3> of_keys{all_windows, 1, of.keys + 1};
        saved.indices_kv = {policy, {all_windows, 1, of.keys}};
        saved.keys = {{policy, of_keys}, {policy, of_keys}, {policy, of_keys}};
        saved.attended = tensor_like(policy, saved.q);
        saved.log_sum_exp = {policy, {batch * routes, of.windows, per_route * of.queries}};
        each_routed(policy, of, saved.logits_kv, [&](const auto& prefixes, Index first, Index count) {
            const auto picks = rows_of(saved.indices_kv.data(), first, count, of.keys);
            top_k_kernel(policy, picks, prefixes.logits.const_view(), Mask(prefixes.mask.const_view()));
            const auto scores =
                KVRouter::scores_of(policy, prefixes.logits, picks, prefixes.mask.const_view(), of.keys);
            const auto part = [&](auto& all) { return rows_of(all.data(), first, count, of.keys + 1); };
            window_keys_kernel(policy, part(saved.keys.indices), part(saved.keys.scores), part(saved.keys.mask),
                               TokensView<const TokenIndex>(picks), scores.const_view(), of.windows, window, first,
                               length);
        });
        each_part(of, [&](const Part& part) {
            const auto kv_of_part = gather(policy, part.tokens(std::as_const(saved.kv).data()),
                                           part.flat(saved.keys.indices));  // (1, count · (k + 1), 2 · e)
            dense_attention_kernel(
                policy, part.queries(saved.attended.data()), part.log_sum_exp(saved.log_sum_exp.data()),
                part.queries(std::as_const(saved.q).data()), kv_of_part.const_view().reshape(part.keys_shape()),
                KeyMask(part.keys(std::as_const(saved.keys.mask).data())),
                part.keys(std::as_const(saved.keys.scores).data()), NoBias());
        });
        saved.attended = by_token(policy, std::move(saved.attended));  // (b, m · q, r · e)
        saved.heavy = linear(policy, saved.attended, heavy_attn.to_out.weight);
        if constexpr (config.use_null_q_tokens)
            add_null_query(policy, out, null_q_token, null_queries(policy, saved, length).const_view());
        scatter(policy, Scatter::add, out, saved.heavy, at_q, single_route(scores_q));
        if (pads) crop(policy, saved.out.view(), padded_out);
        return saved;
    }

    template <Viewable D>
    void expect_backward(const Activations& saved, const D& d_out, const Gradients& gradients) const {
        saved.origin.expect(this->policy(), identity(), saved.tokens);
        expect_parameters();
        expect_like<ConditionalRoutedAutoregressiveAttention>("gradients", *this, gradients);
        expect<Tokens, P>("d_out", d_out);
        expect_shape("d_out", d_out.shape(), saved.tokens.shape());
    }

    /// Returns d_tokens (b, n, d).
    template <typename SomeActivations, Viewable D>
    Out compute_gradients(SomeActivations& saved, const D& d_of_out, Gradients& gradients, Out given = {}) const {
        const P& policy = this->policy();
        if (given) expect_shape("d_tokens", given.shape(), saved.tokens.shape());
        Out d_tokens = detail::result_like(policy, "d_tokens", std::move(given), saved.tokens);
        detail::release(saved.out);
        if (d_tokens.size() == 0) return d_tokens;
        const Index batch = saved.tokens.extent(0), length = saved.logits_kv.extent(2),
                    queries = saved.heavy.extent(1) / (length / window);
        const Sizes of{batch, saved.tokens.extent(1), length / window, queries, saved.indices_kv.extent(2)};
        const bool pads = static_cast<bool>(saved.padded);
        const auto x = pads ? saved.padded.const_view() : saved.tokens;  // (b, N, d)
        Out padded_d_out, padded_d_x;
        if (pads) {
            padded_d_out = tensor_like(policy, x);
            padded_d_x = tensor_like(policy, x);
            pad_sequences(policy, padded_d_out.view(), TokensView<const Scalar>(d_of_out.const_view()), of.length);
        }
        const auto d_out = pads ? padded_d_out.const_view() : d_of_out.const_view();
        const auto d_x = pads ? padded_d_x.view() : d_tokens.view();

        const auto& routing_q = saved.routed_q.routing;
        const auto at_q = single_route(routing_q.indices);
        auto d_heavy = scatter_vjp(policy, Scatter::add, d_out, at_q);  // (b, m · q, d)
        auto d_scores_q = tensor_like(policy, routing_q.scores);
        assign(policy, d_scores_q, row_sum(d_heavy * saved.heavy));
        assign(policy, d_heavy, d_heavy * column(routing_q.scores));
        detail::release(saved.heavy);
        auto d_attended =
            by_route(policy, heavy_attn.to_out.backward(policy, d_heavy, saved.attended, gradients.heavy_attn.to_out));
        d_heavy = {};
        TokensTensor<Scalar, P> swapped_attended;  // the outputs by route, if there are several
        if constexpr (routes > 1) {
            swapped_attended = tensor_like(policy, saved.attended);
            assign(policy, swapped_attended, saved.attended);
            swapped_attended = by_route(policy, std::move(swapped_attended));
        }
        const auto& attended = routes > 1 ? std::as_const(swapped_attended) : std::as_const(saved.attended);

        auto d_q = tensor_like(policy, saved.q), d_with_null = tensor_like(policy, saved.kv);
        set_zero(policy, d_with_null);
        auto d_key_scores = tensor_like(policy, saved.keys.scores);  // (b · r · m, 1, k + 1)
        each_part(of, [&](const Part& part) {
            const auto at = part.flat(saved.keys.indices);
            const auto kv_of_part = gather(policy, part.tokens(std::as_const(saved.kv).data()), at);
            auto d_kv_of_part = tensor_like(policy, kv_of_part);
            dense_attention_vjp_kernel(
                policy, part.queries(d_q.data()), d_kv_of_part.view().reshape(part.keys_shape()),
                part.keys(d_key_scores.data()), part.queries(std::as_const(d_attended).data()),
                part.queries(attended.data()), part.log_sum_exp(std::as_const(saved.log_sum_exp).data()),
                part.queries(std::as_const(saved.q).data()), kv_of_part.const_view().reshape(part.keys_shape()),
                KeyMask(part.keys(std::as_const(saved.keys.mask).data())),
                part.keys(std::as_const(saved.keys.scores).data()), NoBias(), NoBias());
            gather_vjp(policy, part.tokens(d_with_null.data()), d_kv_of_part, at);
        });
        detail::release(saved.kv);
        detail::release(saved.q);
        detail::release(saved.attended);
        d_attended = {};
        swapped_attended = {};
        auto d_logits = tensor_like(policy, saved.logits_kv);
        set_zero(policy, d_logits);
        each_routed(policy, of, saved.logits_kv, [&](const auto& prefixes, Index first, Index count) {
            const auto d_scores = window_keys_vjp<P, Logit>(
                policy, rows_of(std::as_const(d_key_scores).data(), first, count, of.keys + 1));
            const auto d_rows = KVRouter::d_logits_of(
                policy, prefixes.logits, rows_of(std::as_const(saved.indices_kv).data(), first, count, of.keys),
                d_scores.const_view(), prefixes.mask.const_view(), of.keys);  // (count, 1, N)
            for (Index row = 0; row < count;) {  // the windows of one sequence and route after the other
                const Index s = (first + row) / of.windows, end = std::min(count, (s + 1) * of.windows - first);
                add_rows(policy, d_logits.view().rows()[s],
                         MatrixView<const Logit>::unchecked(d_rows.data() + row * length, {end - row, length}));
                row = end;
            }
        });
        TokensTensor<Scalar, P> d_kv(policy, {batch, length, 2 * inner});
        {
            Four d_null(policy, {1, heads, 2, dim_head});
            set_zero(policy, d_null);
            const auto rows = by_route_row(d_null);
            for (Index s = 0; s < of.sequences(); ++s)
                assign(policy, rows.range(s % routes, 1),
                       rows.range(s % routes, 1) + null_row(std::as_const(d_with_null).data(), of, s));
            assign(policy, gradients.heavy_attn.null_kv,
                   gradients.heavy_attn.null_kv +
                       swap_middle_axes(policy, d_null).view().reshape(gradients.heavy_attn.null_kv.shape()));
            crop(policy, d_kv.view(), by_token(policy, std::move(d_with_null)));
        }
        d_q = by_token(policy, std::move(d_q));
        if constexpr (config.rotary_emb) {
            rotary_vjp(policy, heads_of_q(d_q.view()), heads, heavy_attn.inv_freq, {at_q});
            rotary_vjp(policy, heads_of_kv(d_kv.view()), 1, heavy_attn.inv_freq, {});
        }
        auto d_of_heavy = tensor_like(policy, x);
        {
            const auto normed = heavy_attn.norm(policy, x);
            auto d_normed = heavy_attn.to_kv.backward(policy, d_kv, normed, gradients.heavy_attn.to_kv);
            d_kv = {};
            gather_vjp(policy, d_normed.view(),
                       heavy_attn.to_q.backward(policy, d_q, gather(policy, normed, at_q), gradients.heavy_attn.to_q),
                       at_q);
            d_q = {};
            heavy_attn.norm.backward(policy, d_of_heavy.view(), d_normed, x, gradients.heavy_attn.norm);
        }
        light_attn.backward(policy, saved.light, d_x, d_out, x, gradients.light_attn);
        assign(policy, d_x, d_x + d_of_heavy);
        route_logits_vjp(policy, d_x, gradients.kv_router.routing_token.view(), d_logits, x, kv_router.routing_token,
                         KVRouter::logit_scale);
        q_router.backward(policy, saved.routed_q, d_scores_q.const_view(), x, saved.q_mask.const_view(), d_x,
                          gradients.q_router);
        if constexpr (config.use_null_q_tokens)
            null_query_vjp(policy, gradients.null_q_token.view(), d_out,
                           null_queries(policy, saved, length).const_view());
        if (pads) crop(policy, d_tokens.view(), padded_d_x);
        return d_tokens;
    }

    /// Adds the rows of d (count, N) to sum (N), in their order.
    static void add_rows(const P& policy, VectorView<Logit> sum, MatrixView<const Logit> d) {
        const Index count = d.extent(0), length = d.extent(1);
        MatrixTensor<TokenIndex, P> to_one(policy, {1, count});
        set_zero(policy, to_one);
        scatter(policy, Scatter::add, sum.reshape(std::array{Index{1}, Index{1}, length}),
                d.reshape(std::array{Index{1}, count, length}), to_one);
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
    const void* identity() const { return heavy_attn.to_out.weight.data(); }
};

}  // namespace colt5
