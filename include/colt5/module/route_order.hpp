// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/module/config.hpp>
#include <colt5/op/gather.hpp>
#include <colt5/op/swap_first_axes.hpp>
#include <colt5/op/top_k.hpp>
#include <colt5/router/router.hpp>

namespace colt5::detail {

/// How the heavy modules of Routed get a router's picks (b, r, k): as (r, b, k), one route after the other, and with
/// sequence_order each row sorted by token. With one route in the router's order nothing is rearranged, and the heavy
/// module reads the router's (b, 1, k).
template <RoutedConfig config, typename Logit, Policy P>
struct RouteOrder {
    static constexpr bool rearranges = config.num_routes > 1 || config.sequence_order;

    /// Indices and scores of sequences of `length` tokens, rearranged.
    static Routing<Logit, P> rearranged(const P& policy, const Routing<Logit, P>& routing,
                                        [[maybe_unused]] Index length) {
        const auto& [indices, scores] = routing;
        if constexpr (config.sequence_order)
            if (const Index picks = indices.extent(2); picks > 0) {
                const auto ones = pick_scores<Logit>(policy, {}, indices, {});
                // Sorts the indices of a row: of numbers that are 1 at chosen tokens and 0 elsewhere, top_k takes the
                // ones, and of equal numbers that of the lower index first.
                const auto sorted = top_k(policy, place_scores(policy, ones, indices, {}, length), {}, picks);
                return {swap_first_axes(policy, sorted),
                        swap_first_axes(policy, moved(policy, scores, indices, sorted, length))};
            }
        return {swap_first_axes(policy, indices), swap_first_axes(policy, scores)};
    }
    /// Undoes it for the gradient of the scores: d_scores (r, b, k), of these `indices`  →  (b, r, k), of those of
    /// `routing`.
    static TokensTensor<Logit, P> restored(const P& policy, const TokensTensor<Logit, P>& d_scores,
                                           [[maybe_unused]] const TokensTensor<TokenIndex, P>& indices,
                                           [[maybe_unused]] const Routing<Logit, P>& routing,
                                           [[maybe_unused]] Index length) {
        auto d = swap_first_axes(policy, d_scores);
        if constexpr (config.sequence_order)
            d = moved(policy, d, swap_first_axes(policy, indices), routing.indices, length);
        return d;
    }

private:
    /// `numbers` (b, r, k) belong to the indices `from`. Returns them in the order of the indices `to`, which name the
    /// same tokens.
    template <typename Indices>
    static auto moved(const P& policy, const TokensTensor<Logit, P>& numbers, const Indices& from, const Indices& to,
                      Index length) {
        return pick_scores<Logit>(policy, place_scores(policy, numbers, from, {}, length), to, {});
    }
};

}  // namespace colt5::detail
