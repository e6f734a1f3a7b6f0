// SPDX-License-Identifier: MIT
#include <colt5/router/differentiable_top_k_router.hpp>

#include <cmath>

#include "router/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr RouterConfig with(bool straight_through, double temperature = 1, bool cosine = false,
                            bool short_rows = false) {
    return {.dim = 5,
            .num_routing_tokens = 2,
            .straight_through = straight_through,
            .kwargs = {.cum_softmax = {.temperature = temperature,
                                       .cosine_sim_routing = cosine,
                                       .cosine_sim_scale = 3,
                                       .short_rows_score_one = short_rows}}};
}
template <typename Scalar, RouterConfig config>
using TopK = DifferentiableTopKRouter<config, Scalar, Cpu>;

}  // namespace

TEST_CASE("DifferentiableTopKRouter: chooses the top-k of the logits, with ties and masks") {
    const Cpu policy(2);
    auto in_double = make_router<TopK<double, with(true)>>(policy);
    auto in_float = make_router<TopK<float, with(true)>>(policy);
    check_choice<double>(policy, in_double);
    check_choice<float>(policy, in_float);
}

TEST_CASE("DifferentiableTopKRouter: soft scores divide by the sum of all that rank at or below") {
    const Cpu policy(2);
    const auto router = make_router<TopK<double, with(false, 0.6)>>(policy);
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 13, 5}, 0);
    const auto some = random_mask(policy, std::array<Index, 2>{2, 13}, 1);
    for (const Mask mask : {Mask(), some.const_view()})
        for (const Index k : {1, 4, 13, 20}) {
            CAPTURE(k);
            const auto logits = route_logits(policy, x, router.routing_token);
            const auto order = ranked(policy, logits, mask, 13);
            const auto routing = router.route(policy, x.const_view(), mask, k);
            CHECK(same_bits(routing.indices, ranked(policy, logits, mask, k)));
            for (Index b = 0; b < 2; ++b)
                for (Index r = 0; r < 2; ++r)
                    for (Index i = 0; i < routing.indices.extent(2); ++i) {
                        const auto e = [&](Index rank) {
                            const Index token = order.const_view()(b, r, rank), first = order.const_view()(b, r, 0);
                            if (mask && !mask(b, token)) return 0.0;
                            return std::exp((logits.const_view()(b, r, token) - logits.const_view()(b, r, first)) /
                                            0.6);
                        };
                        double sum = 0;
                        for (Index j = i; j < 13; ++j) sum += e(j);
                        CHECK(routing.scores.const_view()(b, r, i) ==
                              doctest::Approx(e(i) / std::max(sum, 1e-6)).epsilon(1e-12));
                    }
        }
}

TEST_CASE_TEMPLATE("DifferentiableTopKRouter: gradients are those of the soft scores", Routers,
                   std::pair<TopK<double, with(false, 0.6)>, TopK<double, with(true, 0.6)>>,
                   std::pair<TopK<double, with(false, 0.6, true)>, TopK<double, with(true, 0.6, true)>>) {
    const Cpu policy(2);
    auto soft = make_router<typename Routers::first_type>(policy);
    const auto straight = make_router<typename Routers::second_type>(policy);
    // Small enough for no sum to fall below the floor, where the maximum counts as a constant.
    auto x = normal<double>(policy, std::array<Index, 3>{2, 13, 5}, 0, 0.6);
    const auto some = random_mask(policy, std::array<Index, 2>{2, 13}, 1);
    for (const Mask mask : {Mask(), some.const_view()})
        for (const Index k : {4, 20}) check_gradients(policy, soft, straight, x, mask, k);
}

TEST_CASE_TEMPLATE("short_rows_score_one: cumulative softmax does not route sequences of at most k real tokens", R,
                   TopK<double, with(false, 1, false, true)>, TopK<double, with(true, 1, false, true)>) {
    const Cpu policy(2);
    const auto router = make_router<R>(policy);
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 13, 5}, 0);
    HostTensor<bool, 2> some(policy, {2, 13});  // 4 and 5 real tokens
    for (Index b = 0; b < 2; ++b)
        for (Index i = 0; i < 13; ++i) some.view()(b, i) = i < 4 + b;
    for (const Mask mask : {Mask(), some.const_view()}) {
        const Index k = mask ? 4 : 13;
        const auto saved = router.forward(policy, x.const_view(), mask, k);
        const auto ones = ones_of_real<double>(policy, saved.routing.indices, mask);
        const auto d_scores = normal<double>(policy, ones.shape(), 1);
        auto d_x = filled<double>(policy, x.shape(), 0);
        auto gradients = colt5::zeros_like_parameters(policy, router);
        router.backward(policy, saved, d_scores.const_view(), x.const_view(), mask, d_x.view(), gradients);
        for (Index b = 0; b < 2; ++b) {
            const bool is_short = !mask || b == 0;
            if (is_short) CHECK(same_bits(sequence(saved.routing.scores, b), sequence(ones, b)));
            const auto of_sample = copy_of(policy, sequence(d_x, b));
            CHECK((inner(of_sample, of_sample) == 0) == is_short);
        }
    }
}

TEST_CASE("DifferentiableTopKRouter: a fully masked sample scores 0 and has no gradient") {
    const Cpu policy(1);
    const auto router = make_router<TopK<float, with(false)>>(policy);
    const auto x = normal<float>(policy, std::array<Index, 3>{1, 6, 5}, 0);
    const auto none = filled<bool>(policy, std::array<Index, 2>{1, 6}, 0);
    const auto saved = router.forward(policy, x.const_view(), none.const_view(), 4);
    CHECK(same_bits(saved.routing.scores, filled<float>(policy, std::array<Index, 3>{1, 2, 4}, 0)));
    auto d_x = filled<float>(policy, x.shape(), 0);
    auto gradients = zeros_like_parameters(policy, router);
    const auto d_scores = normal<float>(policy, saved.routing.scores.shape(), 1);
    router.backward(policy, saved, d_scores.const_view(), x.const_view(), none.const_view(), d_x.view(), gradients);
    CHECK(inner(d_x, d_x) == 0);
    CHECK(inner(gradients.routing_token, gradients.routing_token) == 0);
}
