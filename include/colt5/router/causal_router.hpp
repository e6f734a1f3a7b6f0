// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <utility>

#include <colt5/expr/expr.hpp>
#include <colt5/op/causal_top_k.hpp>
#include <colt5/op/causal_top_k_next.hpp>
#include <colt5/op/gather.hpp>
#include <colt5/router/router.hpp>

namespace colt5 {

/// Strictly causal routing: whether a token is chosen, and its score, depend only on the token itself and on earlier
/// ones. So when a sequence is continued, as in sampling, the routing of its earlier tokens does not change. (The top k
/// of a whole sequence depend on its future.) See causal_top_k for how tokens are chosen.
///
/// `rate` of router_kwargs.causal says which fraction of the tokens is routed, and num_tokens limits their number: once
/// a sequence has that many, none of its later tokens is routed. So num_heavy_tokens should be at least
/// CausalTopK::capacity of the longest sequence, which includes the burst. Picks that are not used have score 0,
/// and scatter leaves their tokens as they are.
template <RouterConfig config, typename Scalar, typename P>
class CausalRouter : public LinearRouter<CausalRouter<config, Scalar, P>, config, Scalar, P> {
    using Base = LinearRouter<CausalRouter, config, Scalar, P>;
    static constexpr auto kwargs = config.kwargs.causal;
    static constexpr CausalTopK how{.rate = kwargs.rate,
                                    .burst = kwargs.burst,
                                    .block_size = kwargs.block_size,
                                    .fetch_k_ratio = kwargs.fetch_k_ratio,
                                    .eps = kwargs.eps,
                                    .straight_through = config.straight_through};
    static_assert(kwargs.rate >= CausalTopK::least_rate && kwargs.rate <= 1,
                  "colt5: router_kwargs.causal.rate must be in [1e-9, 1]");
    static_assert(kwargs.burst == 0 || (kwargs.burst >= 1 && kwargs.burst <= 1e6),
                  "colt5: router_kwargs.causal.burst must be 0 or in [1, 1e6]");
    static_assert(kwargs.block_size >= 1 && kwargs.block_size <= CausalTopK::largest_block &&
                      (kwargs.block_size & (kwargs.block_size - 1)) == 0,
                  "colt5: router_kwargs.causal.block_size must be a power of two up to 1024");
    static_assert(kwargs.fetch_k_ratio >= 1 && kwargs.fetch_k_ratio <= 1e6,
                  "colt5: router_kwargs.causal.fetch_k_ratio must be in [1, 1e6]");
    static_assert(is_divisor(kwargs.eps), "colt5: router_kwargs.causal.eps must be in [1e-6, 1e6]");
    static_assert(kwargs.score_scale >= -1e6 && kwargs.score_scale <= 1e6,
                  "colt5: router_kwargs.causal.score_scale must be in [-1e6, 1e6]");
    static_assert(is_divisor(kwargs.cosine_sim_scale),
                  "colt5: router_kwargs.causal.cosine_sim_scale must be in [1e-6, 1e6]");

public:
    using typename Base::Logit;
    static constexpr bool picks_repeat = false;
    static constexpr bool has_unused_picks = true;
    static constexpr bool is_causal = true;
    static constexpr bool cosine_sim_routing = kwargs.cosine_sim_routing;
    static constexpr double logit_scale = kwargs.score_scale * (cosine_sim_routing ? kwargs.cosine_sim_scale : 1);

    struct Activations {
        Routing<Logit, P> routing;
        Tensor<Logit, P, dynamic, dynamic, dynamic> slopes;  // (b, r, k): derivatives of scores by logits
        Tensor<bool, P, dynamic, dynamic, dynamic> live;     // (b, r, k): which picks are used
        TokensTensor<Logit, P> logits;                       // (b, r, n)
        MatrixTensor<Logit, P> norms;                        // (b, n), of cosine routing
    };

    using Base::Base;

    Routing<Logit, P> route(const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens,
                            TokensView<const Scalar> routing_tokens = {}) const {
        auto picks = causal_top_k(policy, how, this->logits(policy, x, mask, routing_tokens), mask, num_tokens);
        return {std::move(picks.indices), std::move(picks.scores)};
    }

    Activations forward(const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens,
                        TokensView<const Scalar> routing_tokens = {}) const {
        auto [logits, norms] = this->similarity(policy, x, mask, routing_tokens);  // (b, r, n)
        auto picks = causal_top_k(policy, how, logits, mask, num_tokens);
        return {{std::move(picks.indices), std::move(picks.scores)},
                std::move(picks.slopes),
                std::move(picks.live),
                std::move(logits),
                std::move(norms)};
    }

    /// What routing of later tokens reads of earlier ones.
    using State = CausalTopKState<Logit, P>;
    State make_state(const P& policy, Index batch, Index num_tokens) const {
        return {policy, how, batch, config.num_routing_tokens, num_tokens};
    }
    static constexpr Index state_bytes(Index batch) {
        return State::bytes(batch, config.num_routing_tokens, kwargs.block_size);
    }
    /// An upper bound on how many of the first `length` tokens are chosen, where at most num_tokens may be.
    static constexpr Index capacity(Index length, Index num_tokens) {
        return std::min(num_tokens, how.capacity(length));
    }
    /// Routes the next tokens x (b, m, d) of sequences whose earlier tokens `state` knows, as route does those of the
    /// whole sequence. See causal_top_k_next.
    NextCausalPicks<Logit, P> route_next(const P& policy, State& state, TokensView<const Scalar> x, Mask mask,
                                         Index num_tokens) const {
        return causal_top_k_next(policy, how, state, this->logits(policy, x, mask, {}), mask, num_tokens);
    }

    auto d_logits(const P& policy, const Activations& saved, TokensView<const Logit> d_scores, Mask mask) const {
        auto d_picked = tensor_like(policy, saved.slopes);
        assign(policy, d_picked, select(saved.live, d_scores * saved.slopes, Logit(0)));
        return place_scores(policy, d_picked, saved.routing.indices, mask, saved.logits.extent(2));
    }
};

}  // namespace colt5
