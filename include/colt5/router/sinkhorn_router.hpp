// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <colt5/core/tensor.hpp>
#include <colt5/expr/expr.hpp>
#include <colt5/op/gather.hpp>
#include <colt5/op/sinkhorn.hpp>
#include <colt5/router/router.hpp>

namespace colt5 {

/// Where a SinkhornRouter takes its Gumbel noise (b · r, k, n) from.
template <typename Logit>
struct GumbelNoise {
    enum class Source { seeded, given, none };

    /// Training (`forward`) draws fresh noise at every call: that of a token depends on the seed, the number of calls
    /// before, the sample's number, the route, the slot and the token's place in its sequence, and on nothing else.
    /// Evaluation (`route`) draws the same noise at every call and for every sample, none of which training draws: a
    /// sequence alone is routed as in any batch, and nothing changes.
    static GumbelNoise seeded(Seed seed) { return {Source::seeded, seed, {}}; }
    /// This noise at every call; the tensor must outlive the calls.
    template <typename Noise>
    static GumbelNoise given(Noise&& values) {
        static_assert(
            outlives_call<Noise>,
            "colt5: the router keeps a view of its noise: give the tensor a name, a temporary is gone by then");
        return {Source::given, {}, values};
    }
    /// None: all slots then choose the same token; all scores being equal, rounding decides which.
    static GumbelNoise none() { return {Source::none, {}, {}}; }

    Source source = Source::none;
    Seed seed{};
    TokensView<const Logit> values{};
    std::uint64_t calls = 0;  ///< of forward so far; with the seed, the state that files hold
    /// The number of the first sample of a call, where a call has only a part of a batch and draws the noise of the
    /// whole. Where blocks or windows of a sequence are routed, the number of its first block or window.
    Index first_sample = 0;
    bool evaluates = false;  ///< forward draws the noise of evaluation, too: the same at every call

    /// Noise of the next call of forward, or of evaluation, for `batch` samples of `routes` routes.
    template <Policy P>
    TokensTensor<Logit, P> draw(const P& policy, bool training, Index batch, Index routes, Index slots,
                                Index length) const {
        constexpr Index evaluation = Index{1} << 31;  // its rows follow those of training
        if (!training)
            return gumbel_noise<Logit>(policy, Random(seed), batch * routes, slots, length, {evaluation, routes});
        expect_value(first_sample >= 0, "first_sample", ">= 0", first_sample);
        expect_value(batch <= evaluation / routes - first_sample, "first_sample",
                     "so small that the batch ends before 2^31 samples times routes", first_sample);
        const Random random(Seed{seed.value + (calls >> 32)}, calls & 0xFFFFFFFF);
        return gumbel_noise<Logit>(policy, random, batch * routes, slots, length, {first_sample * routes});
    }
};

namespace detail {
/// A visitor for each_parameter: switches off the noise of each router and each dropout that it visits, and restores it
/// when destroyed.
class NoiseOff {
public:
    NoiseOff() = default;
    NoiseOff(const NoiseOff&) = delete;
    NoiseOff& operator=(const NoiseOff&) = delete;
    ~NoiseOff() {
        for (const auto& restore : restores_) restore();
    }

    template <typename... T>
    void operator()(const std::string&, const T&...) const {}
    template <typename Noise>
    void noise(const std::string&, Noise& noise) {
        restores_.push_back([&noise, source = noise.source] { noise.source = source; });
        noise.source = Noise::Source::none;
    }

private:
    std::vector<std::function<void()>> restores_;
};
}  // namespace detail

/// call() with the noise of all routers and dropouts of a module off:
///
///     const auto out = without_noise(block, [&] { return block(tokens, mask); });
template <typename Module, typename Call>
decltype(auto) without_noise(const Module& module, Call&& call) {
    detail::NoiseOff off;
    Module::each_parameter(off, "", module);
    return call();
}

/// Gumbel–Sinkhorn router: each of num_tokens slots chooses the token that an optimal transport gives it; see Sinkhorn.
/// Several slots may choose the same token: its outputs are averaged.
template <RouterConfig config, typename Scalar, typename P>
class SinkhornRouter : public LinearRouter<SinkhornRouter<config, Scalar, P>, config, Scalar, P> {
    using Base = LinearRouter<SinkhornRouter, config, Scalar, P>;
    static constexpr auto kwargs = config.kwargs.sinkhorn;
    static_assert(kwargs.n_iters >= 1, "colt5: router_kwargs.sinkhorn.n_iters must be at least 1");
    static_assert(kwargs.temperature > 0, "colt5: router_kwargs.sinkhorn.temperature must be positive");
    static_assert(is_divisor(kwargs.temperature), "colt5: router_kwargs.sinkhorn.temperature must be in [1e-6, 1e6]");
    static_assert(is_divisor(kwargs.cosine_sim_scale),
                  "colt5: router_kwargs.sinkhorn.cosine_sim_scale must be in [1e-6, 1e6]");

public:
    using typename Base::Logit;
    static constexpr bool cosine_sim_routing = kwargs.cosine_sim_routing;
    static constexpr double logit_scale = cosine_sim_routing ? kwargs.cosine_sim_scale : 1;
    static constexpr bool masked_tokens_take_part = kwargs.masked_tokens_take_part;
    static constexpr bool picks_repeat = true;
    static constexpr bool padding_counts = kwargs.masked_tokens_take_part;

    struct Activations {
        Routing<Logit, P> routing;
        TokensTensor<Logit, P> logits;  // (b, r, n)
        MatrixTensor<Logit, P> norms;   // (b, n), of cosine routing
        TokensTensor<Logit, P> drawn;   // (b · r, k, n), if drawn here
        TokensView<const Logit> noise;  // the same, or what was given
        SinkhornActivations<Logit, P> sinkhorn;
        VectorView<const TokenIndex> picks;  // of each sample, if it was given
    };

    /// Set it to choose another source. Every call of forward adds 1 to noise.calls, whatever the source: threads must
    /// not call forward of one router at the same time.
    mutable GumbelNoise<Logit> noise;

    SinkhornRouter(const P& policy, SeedSequence& seeds)
        : Base(policy, seeds), noise(GumbelNoise<Logit>::seeded(seeds.next_seed())) {}

    Routing<Logit, P> route(const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens,
                            TokensView<const Scalar> routing_tokens = {},
                            VectorView<const TokenIndex> picks = {}) const {
        return choose(policy, x, mask, num_tokens, routing_tokens, picks, false).routing;
    }

    Activations forward(const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens,
                        TokensView<const Scalar> routing_tokens = {}, VectorView<const TokenIndex> picks = {}) const {
        Activations saved = choose(policy, x, mask, num_tokens, routing_tokens, picks, true);
        ++noise.calls;
        return saved;
    }

    auto d_logits(const P& policy, const Activations& saved, TokensView<const Logit> d_scores, Mask mask) const {
        return sinkhorn_vjp(policy, sinkhorn, saved.sinkhorn, d_scores, saved.routing.indices, saved.logits,
                            saved.noise, mask, saved.picks);
    }

    template <typename F, typename... R>
    static void each_parameter(F&& f, const std::string& prefix, R&... routers) {
        Base::each_parameter(f, prefix, routers...);
        if constexpr (requires { f.state(prefix, routers.noise.calls...); }) {
            f.state(name_for<F>(prefix, "noise.seed"), routers.noise.seed.value...);
            f.state(name_for<F>(prefix, "noise.calls"), routers.noise.calls...);
        }
        if constexpr (requires { f.noise(prefix, routers.noise...); })
            f.noise(name_for<F>(prefix, "noise"), routers.noise...);
    }

private:
    Activations choose(const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens,
                       TokensView<const Scalar> routing_tokens, VectorView<const TokenIndex> picks,
                       bool training) const {
        Activations saved;
        saved.picks = picks;
        auto [logits, norms] = this->similarity(policy, x, mask, routing_tokens);
        saved.logits = std::move(logits);  // (b, r, n)
        saved.norms = std::move(norms);
        const auto [batch, routes, length] = saved.logits.shape();
        using Source = typename GumbelNoise<Logit>::Source;
        if (noise.source == Source::seeded) {
            saved.drawn =
                noise.draw(policy, training && !noise.evaluates, batch, routes, std::min(num_tokens, length), length);
            saved.noise = saved.drawn.const_view();
        } else if (noise.source == Source::given) {
            saved.noise = noise.values;
        }
        saved.sinkhorn = sinkhorn_forward(policy, sinkhorn, saved.logits, saved.noise, mask, num_tokens, picks);
        auto& [indices, scores] = saved.routing;
        indices = std::move(saved.sinkhorn.indices);
        scores = pick_scores<Logit>(policy, {}, indices, mask);  // 1, and 0 for masked tokens
        if constexpr (config.straight_through)
            assign(policy, scores, scores + (saved.sinkhorn.scores - saved.sinkhorn.scores));  // NaN stays NaN
        else
            assign(policy, scores, scores * saved.sinkhorn.scores);
        return saved;
    }

    static constexpr Sinkhorn sinkhorn{kwargs.n_iters, kwargs.temperature, kwargs.masked_tokens_take_part};
};

}  // namespace colt5
