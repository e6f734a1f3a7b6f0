// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/op/coordinate_descent.hpp>
#include <colt5/op/gather.hpp>
#include <colt5/op/top_k.hpp>
#include <colt5/op/zero.hpp>
#include <colt5/router/router.hpp>

namespace colt5 {

/// The router of the CoLT5 paper: soft top-k by coordinate descent on the logits s = x · routing_token.
///
/// Scores grow with the logit, so the tokens with the largest scores are those with the largest logits: no descent is
/// needed to choose. (Where many scores saturate at exactly 1 the reference breaks ties arbitrarily; here the larger
/// logit wins, then the lower index.) Under straight-through real tokens score 1, and only backward runs the descent.
///
/// For each sample and routing token, the descent's k is min(num_tokens · fetch_k_ratio, number of real tokens), so
/// that padding changes nothing. (With masked_tokens_count and a fixed number of steps it is
/// min(num_tokens · fetch_k_ratio, n), as in the reference.)
template <RouterConfig config, typename Scalar, typename P>
class CoordinateDescentRouter : public LinearRouter<CoordinateDescentRouter<config, Scalar, P>, config, Scalar, P> {
    using Base = LinearRouter<CoordinateDescentRouter, config, Scalar, P>;
    static constexpr auto kwargs = config.kwargs.coor_descent;
    static_assert(kwargs.n_iters >= 1, "colt5: router_kwargs.coor_descent.n_iters must be at least 1");
    static_assert(kwargs.eps > 0, "colt5: router_kwargs.coor_descent.eps must be positive");
    static_assert(is_divisor(kwargs.eps), "colt5: router_kwargs.coor_descent.eps must be in [1e-6, 1e6]");
    static_assert(kwargs.eps_init >= 0 && kwargs.eps_init <= largest_divisor,
                  "colt5: router_kwargs.coor_descent.eps_init must be in [0, 1e6]");
    static_assert(kwargs.eps_decay > 0 && kwargs.eps_decay <= 1,
                  "colt5: router_kwargs.coor_descent.eps_decay must be in (0, 1]");
    static_assert(kwargs.fetch_k_ratio >= 1, "colt5: router_kwargs.coor_descent.fetch_k_ratio must be at least 1");
    static_assert(kwargs.fetch_k_ratio <= 1e6, "colt5: router_kwargs.coor_descent.fetch_k_ratio must be at most 1e6");
    static_assert(kwargs.score_scale >= -1e6 && kwargs.score_scale <= 1e6,
                  "colt5: router_kwargs.coor_descent.score_scale must be in [-1e6, 1e6]");
    static_assert(is_divisor(kwargs.cosine_sim_scale),
                  "colt5: router_kwargs.coor_descent.cosine_sim_scale must be in [1e-6, 1e6]");

public:
    using typename Base::Logit;
    static constexpr bool picks_repeat = false;
    static constexpr bool padding_counts = kwargs.masked_tokens_count;
    static constexpr bool cosine_sim_routing = kwargs.cosine_sim_routing;
    static constexpr double logit_scale = kwargs.score_scale * (cosine_sim_routing ? kwargs.cosine_sim_scale : 1);

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
        return d_logits_of(policy, saved.logits, saved.routing.indices.const_view(), d_scores, mask, saved.num_tokens);
    }

    /// The scores (b, r, k) of the tokens that top_k(policy, logits, mask, num_tokens) chose.
    static auto scores_of(const P& policy, const TokensTensor<Logit, P>& logits, TokensView<const TokenIndex> indices,
                          Mask mask, SampleCount num_tokens) {
        if constexpr (kwargs.short_rows_score_one)
            if (all_are_short(logits, num_tokens)) return pick_scores<Logit>(policy, {}, indices, mask);
        auto scores = descent_scores(policy, logits, indices, mask, num_tokens);
        if constexpr (kwargs.short_rows_score_one)
            if (mask && !kwargs.masked_tokens_count) set_short_scores(policy, scores.view(), indices, mask, num_tokens);
        return scores;
    }
    /// The gradient of the logits (b, r, n) for that of these scores.
    static auto d_logits_of(const P& policy, const TokensTensor<Logit, P>& logits, TokensView<const TokenIndex> indices,
                            TokensView<const Logit> d_scores, Mask mask, SampleCount num_tokens) {
        if constexpr (kwargs.short_rows_score_one)
            if (all_are_short(logits, num_tokens)) {
                auto none = tensor_like(policy, logits);
                set_zero(policy, none);
                return none;
            }
        const DescentK k = descent_k(num_tokens, logits.extent(2));
        const auto descent_saved = coordinate_descent_forward(policy, descent, k, logits, mask);
        const auto d_all = place_scores(policy, d_scores, indices, mask, logits.extent(2));  // (b, r, n)
        auto d_logits = coordinate_descent_vjp(policy, descent, k, descent_saved, d_all, logits, mask).d_logits;
        if constexpr (kwargs.short_rows_score_one)
            if (mask && !kwargs.masked_tokens_count) set_short_scores_vjp(policy, d_logits.view(), mask, num_tokens);
        return d_logits;
    }

private:
    static bool all_are_short(const TokensTensor<Logit, P>& logits, SampleCount num_tokens) {
        return num_tokens.of_sample == nullptr && logits.extent(2) <= num_tokens.all;
    }
    static constexpr CoordinateDescent descent{.n_iters = kwargs.n_iters,
                                               .eps = kwargs.eps,
                                               .eps_init = kwargs.eps_init,
                                               .eps_decay = kwargs.eps_decay,
                                               .start = kwargs.start,
                                               .limit_k = !kwargs.masked_tokens_count || kwargs.iterate_to_convergence,
                                               .iterate_to_convergence = kwargs.iterate_to_convergence};

    static DescentK descent_k(SampleCount num_tokens, Index length) {
        DescentK k(num_tokens, kwargs.fetch_k_ratio);
        if (kwargs.masked_tokens_count) k.limit(std::max(static_cast<double>(length), 1.0));
        return k;
    }

    static Routing<Logit, P> choose(const P& policy, const TokensTensor<Logit, P>& logits, Mask mask,
                                    SampleCount num_tokens) {
        auto indices = top_k(policy, logits, mask, num_tokens.all);  // (b, r, k)
        auto scores = scores_of(policy, logits, indices.const_view(), mask, num_tokens);
        return {std::move(indices), std::move(scores)};
    }

    static auto descent_scores(const P& policy, const TokensTensor<Logit, P>& logits,
                               TokensView<const TokenIndex> indices, Mask mask,
                               [[maybe_unused]] SampleCount num_tokens) {
        if constexpr (config.straight_through) {
            return straight_through_scores(policy, logits, indices, mask);
        } else {
            const auto all =
                coordinate_descent_forward(policy, descent, descent_k(num_tokens, logits.extent(2)), logits, mask);
            return pick_scores<Logit>(policy, all.scores, indices, mask);
        }
    }
};

}  // namespace colt5
