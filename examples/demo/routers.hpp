// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <string>

#include <colt5/colt5.hpp>

/// Two routers to compare the learned one with. Both meet colt5::Router and have nothing to learn.
namespace demo {

template <typename Scalar, typename P>
class ParameterlessRouter {
public:
    using Logit = colt5::accumulate_t<Scalar>;
    using Routing = colt5::Routing<Logit, P>;
    static constexpr bool picks_repeat = false;

    struct Gradients {};
    struct Activations {
        Routing routing;
    };

    void backward(const P&, const Activations&, colt5::TokensView<const Logit>, colt5::TokensView<const Scalar>,
                  colt5::Mask, colt5::TokensView<Scalar>, Gradients&) const {}
    template <typename F, typename... R>
    static void each_parameter(F&&, const std::string&, R&...) {}
};

/// Chooses tokens by chance, others in each call, with scores of 1.
template <colt5::RouterConfig config, typename Scalar, typename P>
class RandomRouter : public ParameterlessRouter<Scalar, P> {
    using Base = ParameterlessRouter<Scalar, P>;

public:
    using typename Base::Logit, typename Base::Routing, typename Base::Activations;

    RandomRouter(const P&, colt5::SeedSequence& seeds) : seed_(seeds.next_seed()) {}

    Routing route(const P& policy, colt5::TokensView<const Scalar> x, colt5::Mask mask, colt5::Index k) const {
        colt5::TokensTensor<Logit, P> logits(policy, {x.extent(0), config.num_routing_tokens, x.extent(1)});
        const colt5::Random random(seed_, calls_++);
        fill_with(policy, logits, [&](std::size_t i) { return random.uniform(i); });
        auto indices = top_k(policy, logits, mask, k);  // (b, r, k)
        auto scores = colt5::pick_scores<Logit>(policy, {}, indices, mask);
        return {std::move(indices), std::move(scores)};
    }
    Activations forward(const P& policy, colt5::TokensView<const Scalar> x, colt5::Mask mask, colt5::Index k) const {
        return {route(policy, x, mask, k)};
    }

private:
    colt5::Seed seed_;
    mutable std::uint64_t calls_ = 0;
};

/// Chooses no token: what is left is the light branch.
template <colt5::RouterConfig config, typename Scalar, typename P>
class NoRouter : public ParameterlessRouter<Scalar, P> {
    using Base = ParameterlessRouter<Scalar, P>;

public:
    using typename Base::Routing, typename Base::Activations;

    /// Takes a seed, as the other routers do, for the layers that come after to start with the same weights.
    NoRouter(const P&, colt5::SeedSequence& seeds) { seeds.next_seed(); }

    Routing route(const P& policy, colt5::TokensView<const Scalar> x, colt5::Mask, colt5::Index) const {
        const std::array<colt5::Index, 3> none{x.extent(0), config.num_routing_tokens, 0};
        return {{policy, none}, {policy, none}};
    }
    Activations forward(const P& policy, colt5::TokensView<const Scalar> x, colt5::Mask mask, colt5::Index k) const {
        return {route(policy, x, mask, k)};
    }
};

}  // namespace demo
