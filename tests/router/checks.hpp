// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

#include <colt5/colt5.hpp>

#include "support/tensors.hpp"

/// What the tests of the routers share.
namespace support {

using colt5::Mask, colt5::TokenIndex;

/// A router of `seed`; routers of one seed have the same parameters.
template <typename R>
R make_router(const Cpu& policy, std::uint64_t seed = 0) {
    colt5::SeedSequence seeds{colt5::Seed{seed}};
    return R(policy, seeds);
}

/// The choice by its definition: real tokens first, larger logit first, lower index first.
template <typename T>
HostTensor<TokenIndex, 3> ranked(const Cpu& policy, const colt5::TokensTensor<T, Cpu>& logits, Mask mask, Index k) {
    const auto [batch, routes, length] = logits.shape();
    HostTensor<TokenIndex, 3> indices(policy, {batch, routes, std::min(k, length)});
    for (Index b = 0; b < batch; ++b)
        for (Index r = 0; r < routes; ++r) {
            std::vector<TokenIndex> order(static_cast<std::size_t>(length));
            for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<TokenIndex>(i);
            std::stable_sort(order.begin(), order.end(), [&](TokenIndex i, TokenIndex j) {
                const bool real_i = !mask || mask(b, i), real_j = !mask || mask(b, j);
                if (real_i != real_j) return real_i;
                return real_i && logits.const_view()(b, r, i) > logits.const_view()(b, r, j);
            });
            std::copy_n(order.begin(), indices.extent(2), indices.view()[b][r].data());
        }
    return indices;
}

/// Scores of picks under straight-through: 1, and 0 for masked tokens.
template <typename T>
HostTensor<T, 3> ones_of_real(const Cpu& policy, const HostTensor<TokenIndex, 3>& indices, Mask mask) {
    HostTensor<T, 3> scores(policy, indices.shape());
    for (Index b = 0; b < indices.extent(0); ++b)
        for (Index r = 0; r < indices.extent(1); ++r)
            for (Index i = 0; i < indices.extent(2); ++i)
                scores.view()(b, r, i) = !mask || mask(b, indices.const_view()(b, r, i)) ? 1 : 0;
    return scores;
}

/// x whose first `routes` columns are small whole numbers, with a routing token that reads column r for route r: the
/// logits are known exactly, and there are many ties.
template <typename T, typename R>
HostTensor<T, 3> tied_tokens(const Cpu& policy, R& router, const std::array<Index, 3>& shape) {
    auto x = normal<T>(policy, shape, 3, 1.5);
    for (Index i = 0; i < x.size(); ++i) x.data()[i] = std::round(x.data()[i]);
    colt5::fill(policy, router.routing_token, 0);
    for (Index r = 0; r < router.routing_token.extent(0); ++r) router.routing_token.view()(r, r) = T(1);
    return x;
}
template <typename T>
HostTensor<T, 3> first_columns(const Cpu& policy, const colt5::TokensTensor<T, Cpu>& x, Index routes) {
    HostTensor<T, 3> logits(policy, {x.extent(0), routes, x.extent(1)});
    for (Index b = 0; b < x.extent(0); ++b)
        for (Index r = 0; r < routes; ++r)
            for (Index i = 0; i < x.extent(1); ++i) logits.view()(b, r, i) = x.const_view()(b, i, r);
    return logits;
}

/// The choice is the top-k of the logits and the straight-through scores are exactly 1 (masked: 0), with ties and
/// masks, for any k, in inference and training.
template <typename T, typename R>
void check_choice(const Cpu& policy, R& router) {
    const Index routes = router.routing_token.extent(0);
    const auto x = tied_tokens<T>(policy, router, {3, 11, router.routing_token.extent(1)});
    const auto logits = first_columns(policy, x, routes);
    auto some = random_mask(policy, std::array<Index, 2>{3, 11}, 4);
    for (Index i = 0; i < 11; ++i) some.view()(2, i) = false;  // a fully masked sample
    for (const Mask mask : {Mask(), some.const_view()})
        for (const Index k : {1, 4, 10, 11, 14}) {
            CAPTURE(k);
            CAPTURE(static_cast<bool>(mask));
            const auto expected = ranked(policy, logits, mask, k);
            const auto routing = router.route(policy, x.const_view(), mask, k);
            CHECK(same_bits(routing.indices, expected));
            CHECK(same_bits(routing.scores, ones_of_real<T>(policy, expected, mask)));
            const auto saved = router.forward(policy, x.const_view(), mask, k);
            CHECK(same_bits(saved.routing.indices, expected));
            CHECK(same_bits(saved.routing.scores, routing.scores));
        }
}

/// The gradients of the soft router are those of finite differences and accumulate; those of the straight-through
/// router are the same, bit for bit.
template <typename Soft, typename Straight>
void check_gradients(const Cpu& policy, Soft& soft, const Straight& straight, HostTensor<double, 3>& x, Mask mask,
                     Index k) {
    const auto saved = soft.forward(policy, x.const_view(), mask, k);
    const auto hard = straight.forward(policy, x.const_view(), mask, k);
    REQUIRE(same_bits(saved.routing.indices, hard.routing.indices));
    const auto d_scores = normal<double>(policy, saved.routing.scores.shape(), 5);

    auto d_x = filled<double>(policy, x.shape(), 0), d_x_hard = filled<double>(policy, x.shape(), 3);
    auto gradients = colt5::zeros_like_parameters(policy, soft);
    soft.backward(policy, saved, d_scores.const_view(), x.const_view(), mask, d_x.view(), gradients);
    const auto loss = [&] { return inner(d_scores, soft.route(policy, x.const_view(), mask, k).scores); };
    CHECK(inner(gradients.routing_token, gradients.routing_token) > 1e-6);  // there is something to compare
    CHECK(relative_error(d_x, finite_differences(policy, x, loss)) <= 1e-6);
    CHECK(relative_error(gradients.routing_token, finite_differences(policy, soft.routing_token, loss)) <= 1e-6);

    auto gradients_hard = colt5::zeros_like_parameters(policy, straight);
    colt5::fill(policy, gradients_hard.routing_token, 4);
    straight.backward(policy, hard, d_scores.const_view(), x.const_view(), mask, d_x_hard.view(), gradients_hard);
    for (Index i = 0; i < d_x.size(); ++i) d_x_hard.data()[i] -= 3;
    for (Index i = 0; i < gradients_hard.routing_token.size(); ++i) gradients_hard.routing_token.data()[i] -= 4;
    CHECK(relative_error(d_x_hard, d_x) <= 1e-12);
    CHECK(relative_error(gradients_hard.routing_token, gradients.routing_token) <= 1e-12);
}

}  // namespace support
