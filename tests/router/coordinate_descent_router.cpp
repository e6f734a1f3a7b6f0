// SPDX-License-Identifier: MIT
#include <colt5/router/coordinate_descent_router.hpp>

#include <cmath>

#include "router/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr RouterConfig with(bool straight_through, CoordinateDescentKwargs kwargs = {}, Index routes = 2,
                            Index dim = 5) {
    return {.dim = dim,
            .num_routing_tokens = routes,
            .straight_through = straight_through,
            .kwargs = {.coor_descent = kwargs}};
}
template <typename Scalar, RouterConfig config>
using Descent = CoordinateDescentRouter<config, Scalar, Cpu>;

constexpr CoordinateDescentKwargs small_eps{.n_iters = 7, .fetch_k_ratio = 1.25, .eps = 0.3};
constexpr CoordinateDescentKwargs converged{.eps = 0.5, .score_scale = 0.7, .iterate_to_convergence = true};
constexpr CoordinateDescentKwargs scaled_eps{
    .n_iters = 9, .eps = 0.1, .eps_init = 2, .eps_decay = 0.6, .start = DescentStart::minus_logits};
constexpr CoordinateDescentKwargs cosine{
    .n_iters = 7, .eps = 0.3, .score_scale = 0.7, .cosine_sim_routing = true, .cosine_sim_scale = 5};
constexpr CoordinateDescentKwargs short_rows{.n_iters = 7, .eps = 0.3, .short_rows_score_one = true};

}  // namespace

TEST_CASE("CoordinateDescentRouter: chooses the top-k of the logits, with ties and masks") {
    const Cpu policy(2);
    auto in_double = make_router<Descent<double, with(true)>>(policy);
    auto in_float = make_router<Descent<float, with(true)>>(policy);
    check_choice<double>(policy, in_double);
    check_choice<float>(policy, in_float);
}

TEST_CASE("CoordinateDescentRouter: soft scores are those of the descent at the chosen tokens") {
    const Cpu policy(2);
    auto router = make_router<Descent<double, with(false, small_eps)>>(policy);
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 13, 5}, 0);
    const auto some = random_mask(policy, std::array<Index, 2>{2, 13}, 1);
    for (const Mask mask : {Mask(), some.const_view()})
        for (const Index k : {1, 4, 13, 20}) {
            CAPTURE(k);
            const auto logits = route_logits(policy, x, router.routing_token);
            const auto routing = router.route(policy, x.const_view(), mask, k);
            CHECK(same_bits(routing.indices, ranked(policy, logits, mask, k)));
            for (Index b = 0; b < 2; ++b)
                for (Index r = 0; r < 2; ++r) {
                    // the reference's own iteration: a and b of the whole row
                    Index real = 0;
                    for (Index i = 0; i < 13; ++i) real += !mask || mask(b, i) ? 1 : 0;
                    const double wanted = std::min(static_cast<double>(k) * 1.25, static_cast<double>(real));
                    std::array<double, 13> relu{};
                    double a = 0;
                    const auto s = [&](Index i) { return logits.const_view()(b, r, i); };
                    for (Index i = 0; i < 13; ++i) relu[static_cast<std::size_t>(i)] = -std::max(s(i), 0.0);
                    for (int t = 0; t < 7; ++t) {
                        double sum = 0;
                        for (Index i = 0; i < 13; ++i)
                            if (!mask || mask(b, i)) sum += std::exp((s(i) + relu[static_cast<std::size_t>(i)]) / 0.3);
                        a = 0.3 * (std::log(wanted) - std::log(sum));
                        for (Index i = 0; i < 13; ++i) relu[static_cast<std::size_t>(i)] = -std::max(s(i) + a, 0.0);
                    }
                    for (Index i = 0; i < routing.indices.extent(2); ++i) {
                        const Index token = routing.indices.const_view()(b, r, i);
                        const bool is_real = !mask || mask(b, token);
                        const double score = std::exp((s(token) + a + relu[static_cast<std::size_t>(token)]) / 0.3);
                        CHECK(routing.scores.const_view()(b, r, i) ==
                              doctest::Approx(is_real ? score : 0).epsilon(1e-12));
                    }
                }
        }
}

TEST_CASE_TEMPLATE("CoordinateDescentRouter: gradients are those of the soft scores", Routers,
                   std::pair<Descent<double, with(false)>, Descent<double, with(true)>>,
                   std::pair<Descent<double, with(false, small_eps)>, Descent<double, with(true, small_eps)>>,
                   std::pair<Descent<double, with(false, converged)>, Descent<double, with(true, converged)>>,
                   std::pair<Descent<double, with(false, scaled_eps)>, Descent<double, with(true, scaled_eps)>>,
                   std::pair<Descent<double, with(false, cosine)>, Descent<double, with(true, cosine)>>,
                   std::pair<Descent<double, with(false, short_rows)>, Descent<double, with(true, short_rows)>>) {
    const Cpu policy(2);
    auto soft = make_router<typename Routers::first_type>(policy);
    const auto straight = make_router<typename Routers::second_type>(policy);
    auto x = normal<double>(policy, std::array<Index, 3>{2, 13, 5}, 0, 0.7);
    const auto some = random_mask(policy, std::array<Index, 2>{2, 13}, 1);
    for (const Mask mask : {Mask(), some.const_view()}) check_gradients(policy, soft, straight, x, mask, 4);
}

TEST_CASE("CoordinateDescentRouter: cosine routing chooses by direction") {
    const Cpu policy(2);
    auto router = make_router<Descent<double, with(false, cosine)>>(policy);
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 13, 5}, 0);
    const auto some = random_mask(policy, std::array<Index, 2>{2, 13}, 1);
    for (const Mask mask : {Mask(), some.const_view()}) {
        const auto logits = cosine_logits(policy, x, router.routing_token, 0.7 * 5).logits;
        const auto routing = router.route(policy, x.const_view(), mask, 4);
        CHECK(same_bits(routing.indices, ranked(policy, logits, mask, 4)));
        auto longer = copy_of(policy, x);
        for (Index i = 0; i < x.size(); ++i) longer.data()[i] *= 4;  // exact
        const auto same = router.route(policy, longer.const_view(), mask, 4);
        CHECK(same_bits(same.indices, routing.indices));
        CHECK(same_bits(same.scores, routing.scores));
    }
}

TEST_CASE_TEMPLATE("short_rows_score_one: sequences of at most k real tokens are not routed, whatever their padding", R,
                   Descent<double, with(false, short_rows)>, Descent<double, with(true, short_rows)>) {
    const Cpu policy(2);
    const auto router = make_router<R>(policy);
    const auto x = normal<double>(policy, std::array<Index, 3>{3, 13, 5}, 0);
    HostTensor<bool, 2> mask(policy, {3, 13});  // 4, 5 and 6 real tokens
    for (Index b = 0; b < 3; ++b)
        for (Index i = 0; i < 13; ++i) mask.view()(b, i) = i >= 2 && i < 6 + b;
    const auto check = [&](Index k, bool with_mask, Index short_batches) {
        CAPTURE(k);
        const Mask given = with_mask ? mask.const_view() : Mask();
        const auto saved = router.forward(policy, x.const_view(), given, k);
        const auto ones = ones_of_real<double>(policy, saved.routing.indices, given);
        auto d_scores = normal<double>(policy, saved.routing.scores.shape(), 1);
        auto d_x = filled<double>(policy, x.shape(), 0);
        auto gradients = colt5::zeros_like_parameters(policy, router);
        router.backward(policy, saved, d_scores.const_view(), x.const_view(), given, d_x.view(), gradients);
        for (Index b = 0; b < 3; ++b) {
            CAPTURE(b);
            const bool is_short = b < short_batches;
            if (is_short) CHECK(same_bits(sequence(saved.routing.scores, b), sequence(ones, b)));
            CHECK((inner(copy_of(policy, sequence(d_x, b)), copy_of(policy, sequence(d_x, b))) == 0) == is_short);
        }
        CHECK((inner(gradients.routing_token, gradients.routing_token) == 0) == (short_batches == 3));
        CHECK(same_bits(router.route(policy, x.const_view(), given, k).scores, saved.routing.scores));
    };
    check(4, true, 1);
    check(5, true, 2);
    check(6, true, 3);
    check(13, true, 3);
    check(13, false, 3);
    check(12, false, 0);
}

TEST_CASE("CoordinateDescentRouter: ties of saturated scores go to the larger logit, then to the lower index") {
    const Cpu policy(1);
    auto router = make_router<Descent<float, with(false, {}, 1, 1)>>(policy);
    fill(policy, router.routing_token, 1);
    HostTensor<float, 3> x(policy, {1, 40, 1});
    // Twenty logits far above the threshold score exactly 1; only their order tells them apart, and two are equal.
    for (Index i = 0; i < 40; ++i) x.view()(0, i, 0) = i < 20 ? -100.0f : 100.0f + static_cast<float>((i * 7) % 20);
    x.view()(0, 39, 0) = x.view()(0, 25, 0);
    for (const Index k : {1, 3, 10, 20}) {
        const auto routing = router.route(policy, x.const_view(), {}, k);
        CHECK(same_bits(routing.indices, ranked(policy, first_columns(policy, x, 1), Mask(), k)));
    }
    const auto routing = router.route(policy, x.const_view(), {}, 20);
    const auto scores = to_host(policy, routing.scores);
    CHECK(std::count(scores.begin(), scores.end(), 1.0f) > 3);  // a choice by the scores could not tell these apart
}

TEST_CASE(
    "CoordinateDescentRouter: at the default initialization the router has no gradient; score_scale or iterating "
    "to convergence gives it one") {
    constexpr Index dim = 512, length = 2048, k = 64;
    constexpr CoordinateDescentKwargs scale{.score_scale = 0.04419417382415922};  // 1 / √512
    constexpr CoordinateDescentKwargs solve{.fetch_k_ratio = 1, .iterate_to_convergence = true};
    const Cpu policy(2);
    const auto x = normal<float>(policy, std::array<Index, 3>{1, length, dim}, 0);
    const auto gradient_norm = [&]<typename R>(const R& router) {
        const auto saved = router.forward(policy, x.const_view(), {}, k);
        auto d_x = filled<float>(policy, x.shape(), 0);
        auto gradients = zeros_like_parameters(policy, router);
        const auto d_scores = normal<float>(policy, std::array<Index, 3>{1, 1, k}, 1);
        router.backward(policy, saved, d_scores.const_view(), x.const_view(), {}, d_x.view(), gradients);
        CHECK((inner(d_x, d_x) > 0) == (inner(gradients.routing_token, gradients.routing_token) > 0));
        return std::sqrt(inner(gradients.routing_token, gradients.routing_token));
    };
    CHECK(gradient_norm(make_router<Descent<float, with(true, {}, 1, dim)>>(policy)) == 0);
    CHECK(gradient_norm(make_router<Descent<float, with(true, scale, 1, dim)>>(policy)) > 0.01);
    // With 9/8 of the tokens, the default, the chosen ones would all be saturated, converged or not.
    CHECK(gradient_norm(make_router<Descent<float, with(true, solve, 1, dim)>>(policy)) > 0.01);
}

TEST_CASE("CoordinateDescentRouter: rows of any length") {
    constexpr Index length = 200000;  // longer than the reference's fused kernel takes
    const Cpu policy(2);
    auto router = make_router<Descent<float, with(false, {}, 1, 4)>>(policy);
    const auto x = normal<float>(policy, std::array<Index, 3>{1, length, 4}, 0);
    const auto saved = router.forward(policy, x.const_view(), {}, 1000);
    CHECK(
        same_bits(saved.routing.indices, ranked(policy, route_logits(policy, x, router.routing_token), Mask(), 1000)));
    CHECK(saved.routing.scores.const_view()(0, 0, 0) > saved.routing.scores.const_view()(0, 0, 999));
    CHECK(saved.routing.scores.const_view()(0, 0, 999) > 0);
    auto d_x = filled<float>(policy, x.shape(), 0);
    auto gradients = zeros_like_parameters(policy, router);
    router.backward(policy, saved, saved.routing.scores.const_view(), x.const_view(), {}, d_x.view(), gradients);
    CHECK(inner(d_x, d_x) > 0);
}

TEST_CASE("CoordinateDescentRouter: routes in float for float and in double for double") {
    const Cpu policy(1);
    using InFloat = Descent<float, with(false)>;
    using InDouble = Descent<double, with(false)>;
    static_assert(std::is_same_v<InFloat::Logit, float> && std::is_same_v<InDouble::Logit, double>);
    const auto in_float = make_router<InFloat>(policy);
    const auto in_double = make_router<InDouble>(policy);
    const auto routing_f =
        in_float.route(policy, normal<float>(policy, std::array<Index, 3>{2, 50, 5}, 0).const_view(), {}, 9);
    const auto routing_d =
        in_double.route(policy, normal<double>(policy, std::array<Index, 3>{2, 50, 5}, 0).const_view(), {}, 9);
    CHECK(same_bits(routing_f.indices, routing_d.indices));
    const double difference = relative_error(routing_f.scores, routing_d.scores);
    CHECK(difference <= 1e-5);
    CHECK(difference > 0);
}

TEST_CASE("CoordinateDescentRouter: errors name the argument and both values") {
    const Cpu policy(1);
    const auto router = make_router<Descent<float, with(true)>>(policy);
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 4, 5}, 0);
    const auto wide = normal<float>(policy, std::array<Index, 3>{2, 4, 6}, 0);
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 3}, 1);
    CHECK_THROWS_WITH_AS(router.route(policy, x.const_view(), {}, 0), "colt5: `k` must be >= 1, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(router.route(policy, wide.const_view(), {}, 1),
                         "colt5: `x` must have shape (any, any, 5), but has (2, 4, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(router.route(policy, x.const_view(), mask.const_view(), 1),
                         "colt5: `mask` must have shape (2, 4), but has (2, 3)", ShapeError);
}
