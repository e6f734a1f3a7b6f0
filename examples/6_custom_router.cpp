// SPDX-License-Identifier: MIT
// A router of one's own: any class template that meets the Router concept can route every module.
#include <colt5/colt5.hpp>

#include <cstdio>

// [router]
/// Routes the tokens with the largest logits and weights them by sigmoid(logit).
template <colt5::RouterConfig config, typename Scalar, typename P>
struct SigmoidRouter {
    using Logit = colt5::accumulate_t<Scalar>;
    static constexpr bool picks_repeat = false;  // a token is chosen once at most

    struct Gradients {
        colt5::MatrixTensor<Logit, P> routing_token;  // (r, d)
    };
    struct Activations {
        colt5::Routing<Logit, P> routing;
    };

    colt5::MatrixTensor<Scalar, P> routing_token;

    SigmoidRouter(const P& policy, colt5::SeedSequence& seeds)
        : routing_token(policy, {config.num_routing_tokens, config.dim}) {
        fill_normal(policy, routing_token, seeds.next(), 1 / std::sqrt(double(config.dim)));
    }

    auto route(const P& policy, colt5::TokensView<const Scalar> x, colt5::Mask mask, colt5::Index k) const {
        auto scores = route_logits(policy, x, routing_token);  // (b, r, n)
        auto indices = top_k(policy, scores, mask, k);         // (b, r, k)
        assign(policy, scores, sigmoid(scores));
        auto picked = colt5::pick_scores<Logit>(policy, scores, indices, mask);  // 0 for masked tokens
        return colt5::Routing<Logit, P>{std::move(indices), std::move(picked)};
    }
    Activations forward(const P& policy, colt5::TokensView<const Scalar> x, colt5::Mask mask, colt5::Index k) const {
        return {route(policy, x, mask, k)};
    }
    void backward(const P& policy, const Activations& saved, colt5::TokensView<const Logit> d_scores,
                  colt5::TokensView<const Scalar> x, colt5::Mask mask, colt5::TokensView<Scalar> d_x,
                  Gradients& gradients) const {
        const auto& [indices, scores] = saved.routing;
        auto d_logits = tensor_like(policy, scores);                        // (b, r, k)
        assign(policy, d_logits, d_scores * scores * (Logit(1) - scores));  // sigmoid' = y (1 − y)
        route_logits_vjp(policy, d_x, gradients.routing_token.view(),
                         place_scores(policy, d_logits, indices, mask, x.extent(1)), x, routing_token);
    }

    template <typename F, typename... R>
    static void each_parameter(F&& f, const std::string& prefix, R&... routers) {
        f(prefix + "routing_token", routers.routing_token...);
    }
};
// [router]

int main() {
    using namespace colt5;
    constexpr FeedForwardConfig config{.dim = 32, .num_heavy_tokens = 8};
    Cpu policy;
    ConditionalRoutedFeedForward<config, float, Cpu, SigmoidRouter> feedforward{policy, Seed{0}};

    TokensTensor<float, Cpu> tokens(policy, {1, 64, config.dim});
    fill_normal(policy, tokens, Random(Seed{1}));
    auto saved = feedforward.forward(tokens);
    auto gradients = feedforward.make_gradients();
    feedforward.backward(saved, saved.out, gradients);
    std::printf("norm of the routing token's gradient: %g\n", gradients.router.routing_token.matrix().norm());
    return gradients.router.routing_token.matrix().norm() > 0 ? 0 : 1;
}
