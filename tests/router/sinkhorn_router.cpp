// SPDX-License-Identifier: MIT
#include <colt5/router/sinkhorn_router.hpp>

#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "router/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr RouterConfig with(bool straight_through, bool masked_tokens_take_part = false, bool cosine = false) {
    return {.dim = 5,
            .num_routing_tokens = 2,
            .straight_through = straight_through,
            .kwargs = {.sinkhorn = {.n_iters = 5,
                                    .temperature = 0.8,
                                    .masked_tokens_take_part = masked_tokens_take_part,
                                    .cosine_sim_routing = cosine}}};
}
template <typename Scalar, RouterConfig config>
using Slots = SinkhornRouter<config, Scalar, Cpu>;

/// The reference's matrix form for one row: slots × tokens, normalized over tokens, then over slots, again and again.
std::vector<std::vector<double>> transport(const std::vector<double>& log_logit,
                                           const std::vector<std::vector<double>>& noise) {
    const std::size_t slots = noise.size(), tokens = log_logit.size();
    auto z = noise;
    for (std::size_t i = 0; i < slots; ++i)
        for (std::size_t j = 0; j < tokens; ++j) z[i][j] = (log_logit[j] + noise[i][j]) / 0.8;
    for (int t = 0; t < 5; ++t) {
        for (std::size_t i = 0; i < slots; ++i) {
            double sum = 0;
            for (std::size_t j = 0; j < tokens; ++j) sum += std::exp(z[i][j]);
            for (std::size_t j = 0; j < tokens; ++j) z[i][j] -= std::log(sum);
        }
        for (std::size_t j = 0; j < tokens; ++j) {
            double sum = 0;
            for (std::size_t i = 0; i < slots; ++i) sum += std::exp(z[i][j]);
            for (std::size_t i = 0; i < slots; ++i) z[i][j] -= std::log(sum);
        }
    }
    for (auto& row : z)
        for (double& entry : row) entry = std::exp(entry);
    return z;
}

/// Choices and soft scores against the matrix form.
template <RouterConfig config>
void check_choice(const Cpu& policy, Mask mask, TokensView<const double> noise, Index k) {
    constexpr bool all_take_part = config.kwargs.sinkhorn.masked_tokens_take_part;
    auto router = make_router<Slots<double, config>>(policy);
    router.noise = noise ? GumbelNoise<double>::given(noise) : GumbelNoise<double>::none();
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 9, 5}, 0);
    const auto logits = route_logits(policy, x, router.routing_token);
    const auto routing = router.route(policy, x.const_view(), mask, k);
    REQUIRE(routing.indices.shape() == std::array<Index, 3>{2, 2, std::min<Index>(k, 9)});
    for (Index b = 0; b < 2; ++b)
        for (Index r = 0; r < 2; ++r) {
            std::vector<Index> token;  // those that take part
            Index real = 0;
            for (Index j = 0; j < 9; ++j) {
                real += !mask || mask(b, j) ? 1 : 0;
                if (!mask || mask(b, j) || all_take_part) token.push_back(j);
            }
            std::vector<double> log_logit;
            for (const Index j : token)
                log_logit.push_back(
                    std::log(!mask || mask(b, j) ? std::max(logits.const_view()(b, r, j), 1e-20) : 1e-20));
            // Padding must not add slots, or it would change what the real tokens get.
            const Index slots = all_take_part ? std::min<Index>(k, 9) : std::min(k, real);
            std::vector<std::vector<double>> noise_of(static_cast<std::size_t>(slots));
            for (Index i = 0; i < slots; ++i)
                for (const Index j : token)
                    noise_of[static_cast<std::size_t>(i)].push_back(noise ? noise(b * 2 + r, i, j) : 0);
            const auto p = transport(log_logit, noise_of);
            for (Index i = 0; i < routing.indices.extent(2); ++i) {
                const Index chosen = routing.indices.const_view()(b, r, i);
                const double score = routing.scores.const_view()(b, r, i);
                if (i >= slots) {
                    CHECK(score == 0);
                    CHECK((mask && !mask(b, chosen)));
                    continue;
                }
                std::size_t best = token.size();
                for (std::size_t j = 0; j < token.size(); ++j)
                    if ((!mask || mask(b, token[j])) &&
                        (best == token.size() ||
                         p[static_cast<std::size_t>(i)][j] > p[static_cast<std::size_t>(i)][best]))
                        best = j;
                if (best == token.size()) {  // nothing real to choose
                    CHECK(score == 0);
                    continue;
                }
                // Without noise all slots are alike, and so may tokens be: compare what was chosen by its value.
                const auto row = p[static_cast<std::size_t>(i)];
                std::size_t at = 0;
                while (at < token.size() && token[at] != chosen) ++at;
                REQUIRE(at < token.size());
                CHECK((!mask || mask(b, chosen)));
                CHECK(row[at] == doctest::Approx(row[best]).epsilon(1e-9));
                CHECK(score == doctest::Approx(config.straight_through ? 1 : row[best]).epsilon(1e-9));
            }
        }
}

}  // namespace

TEST_CASE("SinkhornRouter: each slot takes the token that the normalized matrix gives it") {
    const Cpu policy(2);
    auto some = random_mask(policy, std::array<Index, 2>{2, 9}, 1, 0.6);
    auto few = filled<bool>(policy, std::array<Index, 2>{2, 9}, 0);
    few.view()(0, 4) = few.view()(0, 7) = true;  // the other sample is fully masked
    for (const Mask mask : {Mask(), some.const_view(), few.const_view()})
        for (const Index k : {1, 4, 9, 12}) {
            CAPTURE(k);
            HostTensor<double, 3> noise(policy, {4, std::min<Index>(k, 9), 9});
            const Random random(Seed{5});
            fill_with(policy, noise, [&](std::size_t i) { return random.gumbel(i); });
            for (const auto given : {TokensView<const double>(), noise.const_view()}) {
                check_choice<with(false)>(policy, mask, given, k);
                check_choice<with(true)>(policy, mask, given, k);
                check_choice<with(false, true)>(policy, mask, given, k);
            }
        }
}

TEST_CASE_TEMPLATE("SinkhornRouter: gradients are those of the soft scores", Routers,
                   std::pair<Slots<double, with(false)>, Slots<double, with(true)>>,
                   std::pair<Slots<double, with(false, true)>, Slots<double, with(true, true)>>,
                   std::pair<Slots<double, with(false, true, true)>, Slots<double, with(true, true, true)>>) {
    const Cpu policy(2);
    auto soft = make_router<typename Routers::first_type>(policy);
    auto straight = make_router<typename Routers::second_type>(policy);
    auto x = normal<double>(policy, std::array<Index, 3>{2, 9, 5}, 0);
    auto some = random_mask(policy, std::array<Index, 2>{2, 9}, 1);
    for (const Index k : {4, 9}) {
        CAPTURE(k);
        HostTensor<double, 3> noise(policy, {4, k, 9});
        const Random random(Seed{5});
        fill_with(policy, noise, [&](std::size_t i) { return random.gumbel(i); });
        soft.noise = straight.noise = GumbelNoise<double>::given(noise.const_view());
        for (const Mask mask : {Mask(), some.const_view()}) check_gradients(policy, soft, straight, x, mask, k);
    }
}

TEST_CASE("SinkhornRouter: masked tokens take part only if asked to") {
    const Cpu policy(1);
    auto apart = make_router<Slots<double, with(false)>>(policy);
    auto together = make_router<Slots<double, with(false, true)>>(policy);
    const auto x = normal<double>(policy, std::array<Index, 3>{1, 9, 5}, 0);
    auto mask = filled<bool>(policy, std::array<Index, 2>{1, 9}, 1);
    for (Index i = 6; i < 9; ++i) mask.view()(0, i) = false;
    const auto shorter = support::copy_of(policy, TokensView<const double>(x.data(), {1, 6, 5}));
    // The same seed: padding leaves the noise of a token as it was.
    apart.noise = GumbelNoise<double>::seeded(Seed{3});
    const auto alone = apart.route(policy, shorter.const_view(), {}, 4);
    apart.noise = together.noise = GumbelNoise<double>::seeded(Seed{3});
    const auto padded = apart.route(policy, x.const_view(), mask.const_view(), 4);
    const auto with_padding = together.route(policy, x.const_view(), mask.const_view(), 4);
    CHECK(same_bits(padded.indices, alone.indices));
    CHECK(relative_error(padded.scores, alone.scores) <= 1e-13);
    CHECK(relative_error(with_padding.scores, alone.scores) > 1e-6);
}

TEST_CASE("SinkhornRouter: the same seed draws the same noise, call by call") {
    const Cpu policy(2);
    constexpr RouterConfig config = with(true);
    const auto a = make_router<Slots<float, config>>(policy, 7), b = make_router<Slots<float, config>>(policy, 7);
    const auto other = make_router<Slots<float, config>>(policy, 8);
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 60, 5}, 0);
    const auto noise = [&](const auto& router) { return router.forward(policy, x.const_view(), {}, 10).drawn; };
    const auto first = noise(a), second = noise(a);
    CHECK(same_bits(noise(b), first));
    CHECK(same_bits(noise(b), second));
    CHECK_FALSE(same_bits(second, first));
    CHECK_FALSE(same_bits(noise(other), first));

    a.noise = GumbelNoise<float>::seeded(Seed{3});
    const auto again = a.forward(policy, x.const_view(), {}, 10);
    a.noise = GumbelNoise<float>::seeded(Seed{3});
    CHECK(same_bits(noise(a), again.drawn));
    a.noise = GumbelNoise<float>::given(again.drawn.const_view());
    CHECK(same_bits(a.route(policy, x.const_view(), {}, 10).indices, again.routing.indices));
    CHECK(same_bits(a.forward(policy, x.const_view(), {}, 10).routing.indices, again.routing.indices));
}

TEST_CASE("SinkhornRouter: evaluation is the same at every call, in every batch, and changes no training") {
    const Cpu policy(2);
    constexpr RouterConfig config = with(false);
    const auto a = make_router<Slots<float, config>>(policy, 7), b = make_router<Slots<float, config>>(policy, 7);
    const auto x = normal<float>(policy, std::array<Index, 3>{3, 60, 5}, 0);
    const auto noise = [&](const auto& router) { return router.forward(policy, x.const_view(), {}, 10).drawn; };
    const auto evaluated = a.route(policy, x.const_view(), {}, 10);
    CHECK(same_bits(a.route(policy, x.const_view(), {}, 10).scores, evaluated.scores));
    CHECK(same_bits(noise(a), noise(b)));
    CHECK(same_bits(a.route(policy, x.const_view(), {}, 10).scores, evaluated.scores));
    CHECK(same_bits(noise(a), noise(b)));
    for (Index sample = 0; sample < 3; ++sample) {
        const auto alone = a.route(policy, x.const_view().range(sample, 1), {}, 10);
        CHECK(same_bits(alone.indices, evaluated.indices.const_view().range(sample, 1)));
        CHECK(same_bits(alone.scores, evaluated.scores.const_view().range(sample, 1)));
    }

    // The noise of evaluation is none that training draws, and the samples of a batch share it; training gives each
    // sample its own.
    const auto rows = [&](bool training, Index batch) {
        const auto drawn = a.noise.draw(policy, training, batch, 2, 10, 60);
        std::vector<std::vector<float>> values;
        for (Index row = 0; row < 2 * batch; ++row) values.push_back(to_host(policy, drawn.const_view()[row]));
        return values;
    };
    const auto of_evaluation = rows(false, 3), of_training = rows(true, 3);
    for (std::size_t row = 0; row < 6; ++row) {
        CHECK(of_evaluation[row] == of_evaluation[row % 2]);
        for (std::size_t of = 0; of < 6; ++of) {
            CHECK(of_training[row] != of_evaluation[of]);
            CHECK((of_training[row] == of_training[of]) == (row == of));
        }
    }
    CHECK(of_evaluation[0] != of_evaluation[1]);
}

TEST_CASE("SinkhornRouter: without noise all slots of a row choose the same token") {
    const Cpu policy(1);
    auto router = make_router<Slots<float, with(true)>>(policy);
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 60, 5}, 0);
    const auto chosen = [&](const Routing<float, Cpu>& routing) {
        std::set<TokenIndex> tokens;
        for (const TokenIndex index : to_host(policy, routing.indices.const_view()[0][0])) tokens.insert(index);
        return tokens.size();
    };
    CHECK(chosen(router.route(policy, x.const_view(), {}, 10)) > 5);
    without_noise(router, [&] {
        CHECK(chosen(router.route(policy, x.const_view(), {}, 10)) == 1);
        CHECK(chosen(router.forward(policy, x.const_view(), {}, 10).routing) == 1);
    });
    CHECK(chosen(router.route(policy, x.const_view(), {}, 10)) > 5);
    CHECK_THROWS_AS(without_noise(router, [&] { router.route(policy, x.const_view(), {}, 0); }), ValueError);
    CHECK(router.noise.source == GumbelNoise<float>::Source::seeded);
}

TEST_CASE("SinkhornRouter: part of a batch is trained as in the batch, by the number of its first sample") {
    const Cpu policy(2);
    auto router = make_router<Slots<float, with(false)>>(policy, 7);
    const auto x = normal<float>(policy, std::array<Index, 3>{3, 60, 5}, 0);
    const auto together = router.forward(policy, x.const_view(), {}, 10).routing;
    for (Index sample = 0; sample < 3; ++sample) {
        router.noise.calls = 0;
        router.noise.first_sample = sample;
        const auto alone = router.forward(policy, x.const_view().range(sample, 1), {}, 10).routing;
        CHECK(same_bits(alone.indices, together.indices.const_view().range(sample, 1)));
        CHECK(same_bits(alone.scores, together.scores.const_view().range(sample, 1)));
    }
    router.noise.first_sample = (Index{1} << 30) - 2;  // times two routes
    CHECK_THROWS_WITH_AS(router.forward(policy, x.const_view(), {}, 10),
                         "colt5: `first_sample` must be so small that the batch ends before 2^31 samples times routes, "
                         "but is 1073741822",
                         ValueError);
}

TEST_CASE("SinkhornRouter: a call that fails does not count") {
    const Cpu policy(1);
    const auto router = make_router<Slots<float, with(true)>>(policy);
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 6, 5}, 0);
    router.forward(policy, x.const_view(), {}, 3);
    CHECK_THROWS_AS(router.forward(policy, x.const_view(), {}, 0), ValueError);
    CHECK(router.noise.calls == 1);
}

TEST_CASE("SinkhornRouter: noise follows the Gumbel distribution, and padding leaves it as it was") {
    const Cpu policy(2);
    const auto noise = gumbel_noise<double>(policy, Random(Seed{1}), 2, 40, 500);
    double sum = 0, squares = 0;
    for (const double value : to_host(policy, noise)) {
        sum += value;
        squares += value * value;
    }
    const double mean = sum / 40000, variance = squares / 40000 - mean * mean;
    CHECK(mean == doctest::Approx(0.5772).epsilon(0.05));
    CHECK(variance == doctest::Approx(1.6449).epsilon(0.05));
    const auto longer = gumbel_noise<double>(policy, Random(Seed{1}), 3, 41, 600);
    for (Index row = 0; row < 2; ++row)
        for (Index slot = 0; slot < 40; ++slot)
            CHECK(same_bits(VectorView<const double>(&longer.const_view()(row, slot, 0), {500}),
                            noise.const_view()[row][slot]));
}

TEST_CASE("SinkhornRouter: logits that are no numbers still choose a real token") {
    const Cpu policy(1);
    auto router = make_router<Slots<float, with(true)>>(policy);
    router.noise = GumbelNoise<float>::none();
    const auto x = filled<float>(policy, std::array<Index, 3>{1, 6, 5}, std::numeric_limits<double>::quiet_NaN());
    auto mask = filled<bool>(policy, std::array<Index, 2>{1, 6}, 1);
    mask.view()(0, 0) = false;
    const auto routing = router.route(policy, x.const_view(), mask.const_view(), 3);
    for (const TokenIndex index : to_host(policy, routing.indices)) {
        CHECK(index >= 1);
        CHECK(index < 6);
    }
}

TEST_CASE("SinkhornRouter: errors name the argument and both values") {
    const Cpu policy(1);
    auto router = make_router<Slots<float, with(true)>>(policy);
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 4, 5}, 0);
    const auto noise = normal<float>(policy, std::array<Index, 3>{4, 3, 5}, 0);
    router.noise = GumbelNoise<float>::given(noise.const_view());
    CHECK_THROWS_WITH_AS(router.route(policy, x.const_view(), {}, 3),
                         "colt5: `noise` must have shape (4, 3, 4), but has (4, 3, 5)", ShapeError);
    router.noise = GumbelNoise<float>::none();
    CHECK_THROWS_WITH_AS(router.route(policy, x.const_view(), {}, 0), "colt5: `slots` must be >= 1, but is 0",
                         ValueError);
}
