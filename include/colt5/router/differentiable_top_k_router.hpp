// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/op/cumulative_softmax.hpp>
#include <colt5/op/gather.hpp>
#include <colt5/op/top_k.hpp>
#include <colt5/op/zero.hpp>
#include <colt5/router/router.hpp>

namespace colt5 {

/// Differentiable top-k by cumulative softmax over the logits s = x · routing_token; see cumulative_softmax.
template <RouterConfig config, typename Scalar, typename P>
class DifferentiableTopKRouter : public LinearRouter<DifferentiableTopKRouter<config, Scalar, P>, config, Scalar, P> {
    using Base = LinearRouter<DifferentiableTopKRouter, config, Scalar, P>;
    static constexpr auto kwargs = config.kwargs.cum_softmax;
    static constexpr double temperature = kwargs.temperature;
    static_assert(temperature > 0, "colt5: router_kwargs.cum_softmax.temperature must be positive");
    static_assert(is_divisor(temperature), "colt5: router_kwargs.cum_softmax.temperature must be in [1e-6, 1e6]");
    static_assert(is_divisor(kwargs.cosine_sim_scale),
                  "colt5: router_kwargs.cum_softmax.cosine_sim_scale must be in [1e-6, 1e6]");

public:
    using typename Base::Logit;
    static constexpr bool picks_repeat = false;
    static constexpr bool cosine_sim_routing = kwargs.cosine_sim_routing;
    static constexpr double logit_scale = cosine_sim_routing ? kwargs.cosine_sim_scale : 1;

    struct Activations {
        Routing<Logit, P> routing;
        TokensTensor<Logit, P> logits;  // (b, r, n)
        MatrixTensor<Logit, P> norms;   // (b, n), of cosine routing
        SampleCount num_tokens = 0;
    };

    using Base::Base;

    Routing<Logit, P> route(const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens,
                            TokensView<const Scalar> routing_tokens = {},
                            VectorView<const TokenIndex> picks = {}) const {
        return choose(policy, this->logits(policy, x, mask, routing_tokens), mask, {num_tokens, picks});
    }

    Activations forward(const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens,
                        TokensView<const Scalar> routing_tokens = {}, VectorView<const TokenIndex> picks = {}) const {
        auto [logits, norms] = this->similarity(policy, x, mask, routing_tokens);  // (b, r, n)
        auto routing = choose(policy, logits, mask, {num_tokens, picks});          // (b, r, k)
        return {std::move(routing), std::move(logits), std::move(norms), {num_tokens, picks}};
    }

    auto d_logits(const P& policy, const Activations& saved, TokensView<const Logit> d_scores, Mask mask) const {
        if constexpr (kwargs.short_rows_score_one)
            if (all_are_short(saved.logits, saved.num_tokens)) {
                auto none = tensor_like(policy, saved.logits);
                set_zero(policy, none);
                return none;
            }
        auto d_logits =
            cumulative_softmax_vjp(policy, temperature, d_scores, saved.logits, saved.routing.indices, mask);
        if constexpr (kwargs.short_rows_score_one)
            if (mask) set_short_scores_vjp(policy, d_logits.view(), mask, saved.num_tokens);
        return d_logits;
    }

private:
    static bool all_are_short(const TokensTensor<Logit, P>& logits, SampleCount num_tokens) {
        return num_tokens.of_sample == nullptr && logits.extent(2) <= num_tokens.all;
    }
    static Routing<Logit, P> choose(const P& policy, const TokensTensor<Logit, P>& logits, Mask mask,
                                    SampleCount num_tokens) {
        auto indices = top_k(policy, logits, mask, num_tokens.all);  // (b, r, k)
        if constexpr (kwargs.short_rows_score_one)
            if (all_are_short(logits, num_tokens)) {
                auto ones = pick_scores<Logit>(policy, {}, indices, mask);
                return {std::move(indices), std::move(ones)};
            }
        Routing<Logit, P> routing = score(policy, logits, std::move(indices), mask);
        if constexpr (kwargs.short_rows_score_one)
            if (mask) set_short_scores(policy, routing.scores.view(), routing.indices, mask, num_tokens);
        return routing;
    }

    template <typename Indices>
    static Routing<Logit, P> score(const P& policy, const TokensTensor<Logit, P>& logits, Indices indices, Mask mask) {
        if constexpr (config.straight_through) {
            auto scores = straight_through_scores(policy, logits, indices, mask);
            return {std::move(indices), std::move(scores)};
        } else {
            auto scores = cumulative_softmax(policy, temperature, logits, indices, mask);
            return {std::move(indices), std::move(scores)};
        }
    }
};

}  // namespace colt5
