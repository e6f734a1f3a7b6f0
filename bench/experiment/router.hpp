// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "arms.hpp"
#include "backend.hpp"

namespace experiment {

/// What all routers of a model share: the arm, and logits or features that depend only on the position.
template <typename Scalar, typename P>
class Gate {
public:
    using Logit = colt5::accumulate_t<Scalar>;

    Gate(const P& policy, Arm of, Index dim, Index share, Index longest, colt5::Seed seed)
        : arm(of), policy_(policy), random_(seed, 1), numbers_(policy, {longest + offsets}) {
        if (arm == Arm::position) {
            features_ = {policy_, {1, longest, dim}};
            fill_with(policy_, features_, [&](std::size_t at) {
                const Index column = static_cast<Index>(at) % dim, i = static_cast<Index>(at) / dim;
                const double frequency = std::pow(1e4, -2 * static_cast<double>(column / 2) / static_cast<double>(dim));
                const double angle = static_cast<double>(i) * frequency;
                return std::sqrt(2.0) * (column % 2 == 0 ? std::sin(angle) : std::cos(angle));
            });
        }
        if (arm == Arm::random)
            fill_with(policy, numbers_, [&](std::size_t i) { return colt5::Random(seed).uniform(i); });
        else
            fill_with(policy, numbers_, [&](std::size_t i) {
                return of == Arm::dense || static_cast<Index>(i) % share == 0 ? 1.0 : 0.0;
            });
    }

    const Arm arm;

    /// Logits (b, r, n) that depend on no token: random numbers, different in each call; or 1 at chosen tokens, else 0.
    /// `policy` is that of the router's stream.
    auto free_logits(const P& policy, Index batch, Index routes, Index length) const {
        colt5::TokensTensor<Logit, P> logits(policy, {batch, routes, length});
        for (Index row = 0; row < batch * routes; ++row) {
            const Index offset =
                arm == Arm::random ? static_cast<Index>(random_.uniform(calls_++) * static_cast<double>(offsets)) : 0;
            assign(policy, logits.view().rows().range(row, 1),
                   colt5::MatrixView<const Logit>(numbers_.data() + offset, {1, length}));
        }
        return logits;
    }

    /// Features of the first positions (1, n, d): √2 sin and √2 cos of i · 10000^(−2j/d), for j = 0, 1, …, d/2 − 1
    colt5::TokensView<const Scalar> positions(Index length) const {
        return features_.const_view().rows().range(0, length).reshape(
            std::array{Index{1}, length, features_.extent(2)});
    }

private:
    static constexpr Index offsets = Index{1} << 17;

    P policy_;
    colt5::Random random_;

    colt5::VectorTensor<Logit, P> numbers_;
    colt5::TokensTensor<Scalar, P> features_;  // of the arm `position`
    mutable std::uint64_t calls_ = 0;
};

/// The router of any arm. The arm is a run-time value, so that the model is compiled once for all.
template <colt5::RouterConfig config, typename Scalar, typename P>
class ArmRouter {
public:
    using Logit = colt5::accumulate_t<Scalar>;
    using Routing = colt5::Routing<Logit, P>;
    static constexpr bool causal = config.router_type == colt5::RouterType::causal;
    static constexpr bool picks_repeat = false;
    static constexpr bool has_unused_picks = causal, is_causal = causal;

    struct Gradients {
        colt5::MatrixTensor<Logit, P> routing_token;  // (r, d)
    };
    struct Activations {
        Routing routing;
        colt5::TokensTensor<Logit, P> logits;                                         // (b, r, n)
        colt5::TokensTensor<Logit, P> slopes;                                         // (b, r, k), if causal
        colt5::Tensor<bool, P, colt5::dynamic, colt5::dynamic, colt5::dynamic> live;  // (b, r, k), if causal
        Index num_tokens;
    };

    colt5::MatrixTensor<Scalar, P> routing_token;  // (r, d)
    const Gate<Scalar, P>* gate = nullptr;         // must be set before the first call

    ArmRouter(const P& policy, colt5::SeedSequence& seeds)
        : routing_token(policy, {config.num_routing_tokens, config.dim}) {
        fill_normal(policy, routing_token, seeds.next());
    }

    Activations forward(const P& policy, colt5::TokensView<const Scalar> x, colt5::Mask mask, Index k) const {
        Activations saved;
        saved.num_tokens = k;
        if (has_soft_scores(gate->arm) || trains_router(gate->arm))
            saved.logits = own_logits(policy, x);
        else
            saved.logits = gate->free_logits(policy, x.extent(0), config.num_routing_tokens, x.extent(1));  // (b, r, n)
        auto& [indices, scores] = saved.routing;
        if constexpr (causal) {
            auto picks = causal_top_k(policy, causal_choice(), saved.logits, mask, k);
            indices = std::move(picks.indices);
            scores = std::move(picks.scores);
            saved.slopes = std::move(picks.slopes);
            saved.live = std::move(picks.live);
        } else {
            indices = top_k(policy, saved.logits, mask, k);  // (b, r, k)
            colt5::TokensTensor<Logit, P> all;               // (b, r, n), or empty: the score is 1
            if (has_soft_scores(gate->arm))
                all = coordinate_descent_forward(policy, descent(), descent_k(k), saved.logits, mask).scores;
            scores = colt5::pick_scores<Logit>(policy, all.const_view(), indices, mask);
        }
        // A module routes at least one token; score 0 removes its heavy output.
        if (gate->arm == Arm::light) set_zero(policy, scores);
        return saved;
    }
    Routing route(const P& policy, colt5::TokensView<const Scalar> x, colt5::Mask mask, Index k) const {
        return forward(policy, x, mask, k).routing;
    }

    void backward(const P& policy, const Activations& saved, colt5::TokensView<const Logit> d_scores,
                  colt5::TokensView<const Scalar> x, colt5::Mask mask, colt5::TokensView<Scalar> d_x,
                  Gradients& gradients) const {
        if (!trains_router(gate->arm)) return;
        colt5::TokensTensor<Logit, P> d_logits;  // (b, r, n)
        if constexpr (causal) {
            auto d_picked = tensor_like(policy, saved.slopes);
            assign(policy, d_picked, select(saved.live, d_scores * saved.slopes, Logit(0)));
            d_logits = place_scores(policy, d_picked, saved.routing.indices, mask, x.extent(1));
        } else {
            const double k = descent_k(saved.num_tokens);
            const auto all = coordinate_descent_forward(policy, descent(), k, saved.logits, mask);
            const auto d_all = place_scores(policy, d_scores, saved.routing.indices, mask, x.extent(1));
            d_logits = coordinate_descent_vjp(policy, descent(), k, all, d_all, saved.logits, mask).d_logits;
        }
        if (gate->arm == Arm::position) {
            const auto features = gate->positions(x.extent(1));
            auto unused = tensor_like(policy, features);
            set_zero(policy, unused);
            for (Index b = 0; b < x.extent(0); ++b)
                route_logits_vjp(policy, unused.view(), gradients.routing_token.view(),
                                 d_logits.const_view().range(b, 1), features, routing_token, logit_scale());
        } else {
            route_logits_vjp(policy, d_x, gradients.routing_token.view(), d_logits, x, routing_token, logit_scale());
        }
    }

    template <typename F, typename... R>
    static void each_parameter(F&& f, const std::string& prefix, R&... routers) {
        f(prefix + "routing_token", routers.routing_token...);
    }

private:
    /// Logits (b, r, n) of the tokens; in the arm `position` those of the positions, the same for all sequences.
    colt5::TokensTensor<Logit, P> own_logits(const P& policy, colt5::TokensView<const Scalar> x) const {
        if (gate->arm != Arm::position) return route_logits(policy, x, routing_token, logit_scale());
        const auto one = route_logits(policy, gate->positions(x.extent(1)), routing_token, logit_scale());  // (1, r, n)
        colt5::TokensTensor<Logit, P> logits(policy, {x.extent(0), one.extent(1), one.extent(2)});
        for (Index b = 0; b < x.extent(0); ++b) assign(policy, logits.view().range(b, 1), one);
        return logits;
    }
    double logit_scale() const {
        return gate->arm == Arm::package ? 1 : 1 / std::sqrt(static_cast<double>(config.dim));
    }
    static double descent_k(Index k) { return 9.0 / 8 * static_cast<double>(k); }
    colt5::CoordinateDescent descent() const {
        return {.n_iters = 50, .limit_k = true, .iterate_to_convergence = gate->arm != Arm::package};
    }
    colt5::CausalTopK causal_choice() const {
        constexpr auto kwargs = config.kwargs.causal;
        return {.rate = gate->arm == Arm::dense ? 1 : kwargs.rate,
                .block_size = kwargs.block_size,
                .straight_through = !has_soft_scores(gate->arm)};
    }
};

}  // namespace experiment
