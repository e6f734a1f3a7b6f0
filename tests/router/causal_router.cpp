// SPDX-License-Identifier: MIT
#include <colt5/router/causal_router.hpp>

#include <algorithm>
#include <string>
#include <type_traits>

#include "router/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr RouterConfig with(bool straight_through, bool cosine = false) {
    return {.dim = 5,
            .num_routing_tokens = 2,
            .straight_through = straight_through,
            .router_type = RouterType::causal,
            .kwargs = {.causal = {.rate = 0.25,
                                  .block_size = 8,
                                  .eps = 0.5,
                                  .score_scale = 0.4,
                                  .cosine_sim_routing = cosine,
                                  .cosine_sim_scale = 3}}};
}
// A function call as an argument that depends on a type makes g++ 12 fail.
constexpr RouterConfig soft = with(false), straight = with(true), soft_cosine = with(false, true);
template <typename Scalar, RouterConfig config>
using Causal = CausalRouter<config, Scalar, Cpu>;

constexpr FeedForwardConfig config_of(bool straight_through) {
    return {.dim = 6,
            .num_heavy_tokens = 100,
            .router_straight_through = straight_through,
            .router_type = RouterType::causal,
            .router_kwargs = {.causal = {.rate = 0.25, .block_size = 8, .score_scale = 0.4}}};
}
constexpr FeedForwardConfig soft_config = config_of(false), straight_config = config_of(true);
template <typename T>
using CausalFeedForward = ConditionalRoutedFeedForward<straight_config, T, Cpu>;

/// Tokens from `from` on replaced by others.
template <typename T>
HostTensor<T, 3> with_another_future(const Cpu& policy, const HostTensor<T, 3>& x, Index from) {
    auto changed = copy_of(policy, x);
    const auto other = normal<T>(policy, x.shape(), 77, 3);
    for (Index b = 0; b < x.extent(0); ++b)
        for (Index i = from; i < x.extent(1); ++i)
            for (Index d = 0; d < x.extent(2); ++d) changed.view()(b, i, d) = other.const_view()(b, i, d);
    return changed;
}

}  // namespace

TEST_CASE_TEMPLATE("CausalRouter: routes by causal_top_k of its logits", T, float, double) {
    const Cpu policy(2);
    const auto router = make_router<Causal<T, soft>>(policy);
    const auto x = normal<T>(policy, std::array<Index, 3>{2, 61, 5}, 0);
    const auto some = random_mask(policy, std::array<Index, 2>{2, 61}, 1);
    const CausalTopK how{.rate = 0.25, .block_size = 8, .eps = 0.5};
    for (const Mask mask : {Mask(), some.const_view()})
        for (const Index limit : {Index{3}, Index{100}}) {
            const auto logits = route_logits(policy, x, router.routing_token, 0.4);
            const auto expected = causal_top_k(policy, how, logits, mask, limit);
            const auto routing = router.route(policy, x.const_view(), mask, limit);
            const auto saved = router.forward(policy, x.const_view(), mask, limit);
            CHECK(same_bits(routing.indices, expected.indices));
            CHECK(same_bits(routing.scores, expected.scores));
            CHECK(same_bits(saved.routing.indices, expected.indices));
            CHECK(same_bits(saved.routing.scores, expected.scores));
            // The view shows how many picks are used.
            const auto summary = summarize(policy, router_view(saved, mask));
            for (Index b = 0; b < 2; ++b)
                for (Index r = 0; r < 2; ++r) {
                    const bool* const live = expected.live.const_view()[b][r].data();
                    CHECK(summary.live.const_view()(b, r) == std::count(live, live + expected.live.extent(2), true));
                }
        }
}

TEST_CASE_TEMPLATE("CausalRouter: a score at a constant price has the gradient of its own logit", R,
                   Causal<double, soft>, Causal<double, straight>) {
    const Cpu policy(2);
    const auto router = make_router<R>(policy);
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 61, 5}, 0);
    const auto some = random_mask(policy, std::array<Index, 2>{2, 61}, 1);
    for (const Mask mask : {Mask(), some.const_view()}) {
        const auto saved = router.forward(policy, x.const_view(), mask, 100);
        const auto d_scores = normal<double>(policy, saved.routing.scores.shape(), 5);
        auto d_x = filled<double>(policy, x.shape(), 2), expected = filled<double>(policy, x.shape(), 2);
        auto gradients = zeros_like_parameters(policy, router);
        auto expected_token = filled<double>(policy, router.routing_token.shape(), 0);
        Index sloped = 0;
        for (Index b = 0; b < 2; ++b)
            for (Index r = 0; r < 2; ++r)
                for (Index i = 0; i < d_scores.extent(2); ++i) {
                    const Index token = saved.routing.indices.const_view()(b, r, i);
                    const double slope = saved.slopes.const_view()(b, r, i);
                    const double d_logit = 0.4 * slope * d_scores.const_view()(b, r, i);
                    sloped += slope > 0;
                    for (Index d = 0; d < 5; ++d) {
                        expected.view()(b, token, d) += d_logit * router.routing_token.const_view()(r, d);
                        expected_token.view()(r, d) += d_logit * x.const_view()(b, token, d);
                    }
                }
        CHECK(sloped > 10);
        router.backward(policy, saved, d_scores.const_view(), x.const_view(), mask, d_x.view(), gradients);
        CHECK(relative_error(d_x, expected) <= 1e-13);
        CHECK(relative_error(gradients.routing_token, expected_token) <= 1e-13);
    }
}

TEST_CASE_TEMPLATE("CausalRouter: in the last block, whose price is fixed, gradients are finite differences", R,
                   Causal<double, soft>, Causal<double, soft_cosine>) {
    const Cpu policy(2);
    const auto router = make_router<R>(policy);
    auto x = normal<double>(policy, std::array<Index, 3>{2, 24, 5}, 9);
    const auto saved = router.forward(policy, x.const_view(), {}, 100);
    auto d_scores = normal<double>(policy, saved.routing.scores.shape(), 5);
    Index counted = 0;
    for (Index i = 0; i < d_scores.size(); ++i) {
        if (saved.routing.indices.data()[i] < 16 || !saved.live.data()[i]) d_scores.data()[i] = 0;
        counted += d_scores.data()[i] != 0 && saved.slopes.data()[i] > 0;
    }
    REQUIRE(counted > 0);
    auto d_x = filled<double>(policy, x.shape(), 0);
    auto gradients = zeros_like_parameters(policy, router);
    router.backward(policy, saved, d_scores.const_view(), x.const_view(), {}, d_x.view(), gradients);
    const auto loss = [&] { return inner(d_scores, router.route(policy, x.const_view(), {}, 100).scores); };
    const auto by_differences = finite_differences(policy, x, loss);
    for (Index b = 0; b < 2; ++b)
        for (Index i = 16; i < 24; ++i)
            for (Index d = 0; d < 5; ++d)
                CHECK(d_x.const_view()(b, i, d) ==
                      doctest::Approx(by_differences.const_view()(b, i, d)).epsilon(1e-6).scale(1e-3));
}

TEST_CASE_TEMPLATE("RouterType::causal: a routed feedforward does not see the future, bit for bit", T, float, double) {
    const Cpu policy(2);
    const CausalFeedForward<T> module(policy, Seed{3});
    const auto x = normal<T>(policy, std::array<Index, 3>{2, 75, 6}, 1);
    const auto out = module(x);
    Index routed = 0;
    for (const auto& saved = module.forward(x); const T score : saved.routed.routing.scores.vector())
        routed += score > 0;
    CHECK(routed > 20);
    for (Index from = 1; from < 75; from += 3) {
        const auto other = module(with_another_future<T>(policy, x, from));
        for (Index b = 0; b < 2; ++b)
            for (Index i = 0; i < from; ++i)
                for (Index d = 0; d < 6; ++d) CHECK(other.const_view()(b, i, d) == out.const_view()(b, i, d));
    }
}

TEST_CASE("RouterType::causal: batched equals one at a time, and padding changes nothing") {
    const Cpu policy(2);
    const CausalFeedForward<float> module(policy, Seed{3});
    const auto x = normal<float>(policy, std::array<Index, 3>{3, 50, 6}, 1);
    const auto out = module(x);
    const HostTensor<bool, 2> mask = filled<bool>(policy, std::array<Index, 2>{1, 80}, false);
    for (Index b = 0; b < 3; ++b) {
        auto padded = normal<float>(policy, std::array<Index, 3>{1, 80, 6}, 8);
        auto real = copy_of(policy, mask);
        std::copy_n(x.const_view()[b].data(), 300, padded.data());
        std::fill_n(real.data(), 50, true);
        const auto alone = module(TokensView<const float>(x.const_view()[b].data(), {1, 50, 6}));
        const auto in_padding = module(padded, real.const_view());
        for (Index i = 0; i < 300; ++i) {
            CHECK(alone.data()[i] == out.const_view()[b].data()[i]);
            CHECK(in_padding.data()[i] == out.const_view()[b].data()[i]);
        }
    }
}

TEST_CASE("RouterType::causal: gradients of the branches by finite differences") {
    const Cpu policy(2);
    ConditionalRoutedFeedForward<soft_config, double, Cpu> module(policy, Seed{3});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 40, 6}, 1);
    const auto d_out = normal<double>(policy, x.shape(), 2);
    auto gradients = module.make_gradients();
    module.backward(module.forward(x), d_out, gradients);
    const auto loss = [&] { return inner(d_out, module(x)); };
    module.each_parameter(
        [&](const std::string& name, auto& parameter, auto& gradient) {
            CAPTURE(name);
            if (name == "router.routing_token") return;  // it moves the price, which counts as a constant
            CHECK(relative_error(gradient, finite_differences(policy, parameter, loss)) <= 1e-6);
        },
        "", module, gradients);
}
