// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/op/cumulative_softmax.hpp>
#include <colt5/op/gather.hpp>
#include <colt5/op/top_k.hpp>
#include <colt5/router/linear_router.hpp>

namespace colt5 {

/// Differentiable top-k by cumulative softmax over the logits s = x · routing_token; see cumulative_softmax.
template <RouterConfig config, typename Scalar, typename P>
class DifferentiableTopKRouter : public LinearRouter<DifferentiableTopKRouter<config, Scalar, P>, config, Scalar, P> {
    using Base = LinearRouter<DifferentiableTopKRouter, config, Scalar, P>;
    static constexpr double temperature = config.kwargs.cum_softmax.temperature;
    static_assert(temperature > 0, "colt5: router_kwargs.cum_softmax.temperature must be positive");
    static_assert(is_divisor(temperature), "colt5: router_kwargs.cum_softmax.temperature must be in [1e-6, 1e6]");

public:
    using typename Base::Logit;
    static constexpr bool picks_repeat = false;

    struct Activations {
        Routing<Logit, P> routing;
        TokensTensor<Logit, P> logits;  // (b, r, n)
    };

    using Base::Base;

    Routing<Logit, P> route(const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens) const {
        return choose(policy, this->logits(policy, x, mask), mask, num_tokens);
    }

    Activations forward(const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens) const {
        auto logits = this->logits(policy, x, mask);              // (b, r, n)
        auto routing = choose(policy, logits, mask, num_tokens);  // (b, r, k)
        return {std::move(routing), std::move(logits)};
    }

    auto d_logits(const P& policy, const Activations& saved, TokensView<const Logit> d_scores, Mask mask) const {
        return cumulative_softmax_vjp(policy, temperature, d_scores, saved.logits, saved.routing.indices, mask);
    }

private:
    static Routing<Logit, P> choose(const P& policy, const TokensTensor<Logit, P>& logits, Mask mask,
                                    Index num_tokens) {
        auto indices = top_k(policy, logits, mask, num_tokens);  // (b, r, k)
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
