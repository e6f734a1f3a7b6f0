// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/op/cumulative_softmax.hpp>
#include <colt5/op/pick.hpp>
#include <colt5/op/route_logits.hpp>
#include <colt5/op/top_k.hpp>
#include <colt5/router/router.hpp>

namespace colt5 {

/// Differentiable top-k by cumulative softmax over the logits s = x · routing_token; see cumulative_softmax.
template <RouterConfig config, typename Scalar, typename P>
class DifferentiableTopKRouter {
    static constexpr double temperature = config.kwargs.cum_softmax.temperature;
    static_assert(config.dim >= 1, "colt5: RouterConfig.dim must be at least 1");
    static_assert(config.num_routing_tokens >= 1, "colt5: RouterConfig.num_routing_tokens must be at least 1");
    static_assert(temperature > 0, "colt5: router_kwargs.cum_softmax.temperature must be positive");

public:
    using Logit = accumulate_t<Scalar>;
    static constexpr bool picks_repeat = false;

    struct Gradients {
        MatrixTensor<accumulate_t<Scalar>, P> routing_token;  // (r, d)
    };
    struct Pass {
        Routing<Logit, P> routing;
        TokensTensor<Logit, P> logits;  // (b, r, n)
    };

    MatrixTensor<Scalar, P> routing_token;  // (r, d)

    DifferentiableTopKRouter(const P& policy, SeedSequence& seeds)
        : routing_token(policy, {config.num_routing_tokens, config.dim}) {
        fill_normal(policy, routing_token, seeds.next());
    }

    Routing<Logit, P> route(const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens) const {
        return choose(policy, route_logits(policy, x, routing_token), mask, num_tokens);
    }

    Pass forward(const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens) const {
        auto logits = route_logits(policy, x, routing_token);     // (b, r, n)
        auto routing = choose(policy, logits, mask, num_tokens);  // (b, r, k)
        return {std::move(routing), std::move(logits)};
    }

    void backward(const P& policy, const Pass& pass, TokensView<const Logit> d_scores, TokensView<const Scalar> x,
                  Mask mask, TokensView<Scalar> d_x, Gradients& gradients) const {
        const auto d_logits = cumulative_softmax_vjp(policy, temperature, d_scores, pass.logits, pass.routing.indices,
                                                     mask);  // (b, r, n)
        route_logits_vjp(policy, d_x, gradients.routing_token.view(), d_logits, x, routing_token);
    }

    template <typename F, typename... R>
    static void each_parameter(F&& f, const std::string& prefix, R&... routers) {
        f(prefix + "routing_token", routers.routing_token...);
    }

private:
    static Routing<Logit, P> choose(const P& policy, const TokensTensor<Logit, P>& logits, Mask mask,
                                    Index num_tokens) {
        auto indices = top_k(policy, logits, mask, num_tokens);  // (b, r, k)
        if constexpr (config.straight_through) {
            auto scores = pick_scores<Logit>(policy, {}, indices, mask);  // 1, and 0 for masked tokens
            return {std::move(indices), std::move(scores)};
        } else {
            auto scores = cumulative_softmax(policy, temperature, logits, indices, mask);
            return {std::move(indices), std::move(scores)};
        }
    }
};

}  // namespace colt5
