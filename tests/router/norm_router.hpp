// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <string>
#include <utility>

#include <colt5/colt5.hpp>

/// A router as a user would write it: it knows nothing of the library's own routers. Route r takes the tokens with the
/// largest weight_r · mean(x²), and scores them by the logistic function of that number.
template <colt5::RouterConfig config, typename Scalar, typename P>
class NormRouter {
public:
    using Logit = colt5::accumulate_t<Scalar>;
    static constexpr bool picks_repeat = false;

    struct Gradients {
        colt5::VectorTensor<Scalar, P> weight;  // (r)
    };
    struct Activations {
        colt5::Routing<Logit, P> routing;
    };

    colt5::VectorTensor<Scalar, P> weight;  // (r)

    NormRouter(const P& policy, colt5::SeedSequence& seeds) : weight(policy, {config.num_routing_tokens}) {
        colt5::fill_normal(policy, weight, seeds.next());
    }

    colt5::Routing<Logit, P> route(const P& policy, colt5::TokensView<const Scalar> x, colt5::Mask mask,
                                   colt5::Index num_tokens) const {
        const auto [batch, length, dim] = x.shape();
        colt5::TokensTensor<Logit, P> logits(policy, {batch, weight.extent(0), length});
        auto scores = colt5::tensor_like(policy, logits);
        for (colt5::Index b = 0; b < batch; ++b)
            for (colt5::Index r = 0; r < weight.extent(0); ++r)
                for (colt5::Index i = 0; i < length; ++i) {
                    const Logit logit = weight.const_view()(r) * mean_square(x[b][i]);
                    logits.view()(b, r, i) = logit;
                    scores.view()(b, r, i) = logistic(logit);
                }
        auto indices = colt5::top_k(policy, logits, mask, num_tokens);
        auto picked = colt5::pick_scores<Logit>(
            policy, config.straight_through ? colt5::TokensView<const Logit>() : scores.const_view(), indices, mask);
        return {std::move(indices), std::move(picked)};
    }

    Activations forward(const P& policy, colt5::TokensView<const Scalar> x, colt5::Mask mask,
                        colt5::Index num_tokens) const {
        return {route(policy, x, mask, num_tokens)};
    }

    void backward(const P&, const Activations& saved, colt5::TokensView<const Logit> d_scores,
                  colt5::TokensView<const Scalar> x, colt5::Mask mask, colt5::TokensView<Scalar> d_x,
                  Gradients& gradients) const {
        const auto indices = saved.routing.indices.const_view();
        const auto dim = static_cast<Logit>(x.extent(2));
        for (colt5::Index b = 0; b < indices.extent(0); ++b)
            for (colt5::Index r = 0; r < indices.extent(1); ++r)
                for (colt5::Index i = 0; i < indices.extent(2); ++i) {
                    const colt5::Index token = indices(b, r, i);
                    if (mask && !mask(b, token)) continue;
                    const Logit w = weight.const_view()(r), square = mean_square(x[b][token]);
                    const Logit score = logistic(w * square);
                    const Logit d_logit = d_scores(b, r, i) * score * (1 - score);
                    gradients.weight.view()(r) += d_logit * square;
                    for (colt5::Index j = 0; j < x.extent(2); ++j)
                        d_x(b, token, j) += d_logit * w * 2 * x(b, token, j) / dim;
                }
    }

    template <typename F, typename... R>
    static void each_parameter(F&& f, const std::string& prefix, R&... routers) {
        f(prefix + "weight", routers.weight...);
    }

private:
    static Logit logistic(Logit x) { return 1 / (1 + std::exp(-x)); }
    static Logit mean_square(colt5::VectorView<const Scalar> x) {
        Logit sum = 0;
        for (colt5::Index j = 0; j < x.size(); ++j) sum += x(j) * x(j);
        return sum / static_cast<Logit>(x.size());
    }
};
