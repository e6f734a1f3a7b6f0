// SPDX-License-Identifier: MIT
#pragma once

#include <limits>

#include <colt5/core/tensor.hpp>
#include <colt5/expr/expr.hpp>
#include <colt5/op/gather.hpp>

namespace colt5 {

/// What a router did in a forward pass: views of what is saved for backward, which must outlive them.
template <typename Logit>
struct RouterView {
    TokensView<const TokenIndex> indices;  // (b, r, k)
    TokensView<const Logit> scores;        // (b, r, k); 0 for masked tokens
    TokensView<const Logit> logits;        // (b, r, n); absent if the router saves none in `logits`
    Mask mask;                             // (b, n) or absent
    TokensView<const bool> live;  // (b, r, k): picks that are used; absent if every pick of a real token is used
};

/// The view of what forward of a router returned, for tokens with this mask.
template <typename Activations>
auto router_view(const Activations& routed, Mask mask) {
    RouterView<typename decltype(routed.routing.scores)::value_type> view{
        routed.routing.indices.const_view(), routed.routing.scores.const_view(), {}, mask, {}};
    if constexpr (requires { view.logits = routed.logits.const_view(); }) view.logits = routed.logits.const_view();
    if constexpr (requires { routed.live.const_view(); }) view.live = routed.live.const_view();
    return view;
}

template <typename Logit, Policy P>
struct RoutingSummary {
    MatrixTensor<Logit, P> live;        // (b, r): how many real tokens a route has chosen
    MatrixTensor<Logit, P> thresholds;  // (b, r): the least of their logits, +∞ if there are none; empty without logits
};

/// Reads the chosen tokens alone. Like all operations it queues its work: the host does not wait, and a CUDA graph may
/// contain it.
template <Policy P, typename Logit>
RoutingSummary<Logit, P> summarize(const P& policy, const RouterView<Logit>& view) {
    auto real = pick_scores<Logit>(policy, {}, view.indices, view.mask);  // (b, r, k): 1, 0 for masked tokens
    if (view.live) assign(policy, real, cast<Logit>(view.live));
    RoutingSummary<Logit, P> summary{{policy, {real.extent(0), real.extent(1)}}, {}};
    assign(policy, summary.live, row_sum(real));
    if (view.logits) {
        const auto logits = pick_scores<Logit>(policy, view.logits, view.indices, view.mask);
        summary.thresholds = tensor_like(policy, summary.live);
        assign(policy, summary.thresholds,
               row_min(select(as_expression(real) > Logit(0), logits, std::numeric_limits<Logit>::infinity())));
    }
    return summary;
}

}  // namespace colt5
