// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/expr/expr.hpp>
#include <colt5/op/pick.hpp>
#include <colt5/op/sinkhorn.hpp>
#include <colt5/router/linear_router.hpp>

namespace colt5 {

/// Where a SinkhornRouter takes its Gumbel noise (b · r, k, n) from.
template <typename Logit>
struct GumbelNoise {
    enum class Source { seeded, given, none };

    /// Fresh noise at every call: the i-th call after this draws the i-th stream of the seed.
    static GumbelNoise seeded(Seed seed) { return {Source::seeded, seed, {}}; }
    /// This noise at every call; it must outlive the calls.
    static GumbelNoise given(TokensView<const Logit> values) { return {Source::given, {}, values}; }
    static GumbelNoise none() { return {Source::none, {}, {}}; }

    Source source = Source::none;
    Seed seed{};
    TokensView<const Logit> values{};
    std::uint64_t calls = 0;
};

/// Gumbel–Sinkhorn router: each of num_tokens slots chooses the token that an optimal transport gives it; see Sinkhorn.
/// Several slots may choose the same token: its outputs are averaged.
template <RouterConfig config, typename Scalar, typename P>
class SinkhornRouter : public LinearRouter<SinkhornRouter<config, Scalar, P>, config, Scalar, P> {
    using Base = LinearRouter<SinkhornRouter, config, Scalar, P>;
    static constexpr auto kwargs = config.kwargs.sinkhorn;
    static_assert(kwargs.n_iters >= 1, "colt5: router_kwargs.sinkhorn.n_iters must be at least 1");
    static_assert(kwargs.temperature > 0, "colt5: router_kwargs.sinkhorn.temperature must be positive");

public:
    using typename Base::Logit;
    static constexpr bool picks_repeat = true;

    struct Pass {
        Routing<Logit, P> routing;
        TokensTensor<Logit, P> logits;  // (b, r, n)
        TokensTensor<Logit, P> drawn;   // (b · r, k, n), if drawn here
        TokensView<const Logit> noise;  // the same, or what was given
        SinkhornPass<Logit, P> sinkhorn;
    };

    /// Set it to choose another source. Seeded noise makes routing differ from call to call: one call at a time.
    mutable GumbelNoise<Logit> noise;

    SinkhornRouter(const P& policy, SeedSequence& seeds)
        : Base(policy, seeds), noise(GumbelNoise<Logit>::seeded(seeds.next_seed())) {}

    Routing<Logit, P> route(const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens) const {
        return forward(policy, x, mask, num_tokens).routing;
    }

    Pass forward(const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens) const {
        Pass pass;
        pass.logits = this->logits(policy, x);  // (b, r, n)
        const auto [batch, routes, length] = pass.logits.shape();
        using Source = typename GumbelNoise<Logit>::Source;
        if (noise.source == Source::seeded)
            pass.drawn = gumbel_noise<Logit>(policy, Random(noise.seed, noise.calls++), batch * routes,
                                             std::min(num_tokens, length), length);
        pass.noise = noise.source == Source::seeded ? pass.drawn.const_view() : noise.values;
        pass.sinkhorn = sinkhorn_forward(policy, sinkhorn, pass.logits, pass.noise, mask, num_tokens);
        auto& [indices, scores] = pass.routing;
        indices = std::move(pass.sinkhorn.indices);
        scores = pick_scores<Logit>(policy, {}, indices, mask);  // 1, and 0 for masked tokens
        if constexpr (!config.straight_through) assign(policy, scores, scores * pass.sinkhorn.scores);
        return pass;
    }

    auto d_logits(const P& policy, const Pass& pass, TokensView<const Logit> d_scores, Mask mask) const {
        return sinkhorn_vjp(policy, sinkhorn, pass.sinkhorn, d_scores, pass.routing.indices, pass.logits, pass.noise,
                            mask);
    }

private:
    static constexpr Sinkhorn sinkhorn{kwargs.n_iters, kwargs.temperature, kwargs.masked_tokens_take_part};
};

}  // namespace colt5
