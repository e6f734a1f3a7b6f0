// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <colt5/colt5.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr RouterConfig config{.dim = 4, .num_routing_tokens = 3};

template <RouterType type, typename Scalar>
using Of = typename RouterOf<type>::template type<config, Scalar, Cpu>;

template <typename Scalar>
constexpr bool all_are_routers = Router<Of<RouterType::coor_descent, Scalar>, Scalar, Cpu>&&
    Router<Of<RouterType::cum_softmax, Scalar>, Scalar, Cpu>&& Router<Of<RouterType::sinkhorn, Scalar>, Scalar, Cpu>;
static_assert(all_are_routers<float> && all_are_routers<double>);

static_assert(std::is_same_v<Of<RouterType::coor_descent, float>, CoordinateDescentRouter<config, float, Cpu>>);
static_assert(std::is_same_v<Of<RouterType::cum_softmax, float>, DifferentiableTopKRouter<config, float, Cpu>>);
static_assert(std::is_same_v<Of<RouterType::sinkhorn, float>, SinkhornRouter<config, float, Cpu>>);

}  // namespace

TEST_CASE_TEMPLATE("routers: one parameter under the reference's name, drawn as torch.randn", R,
                   Of<RouterType::coor_descent, double>, Of<RouterType::cum_softmax, double>,
                   Of<RouterType::sinkhorn, double>) {
    const Cpu policy(1);
    SeedSequence seeds(Seed{3}), same(Seed{3});
    const R router(policy, seeds);
    std::vector<std::string> names;
    R::each_parameter(
        [&](const std::string& name, const auto& value) {
            names.push_back(name);
            CHECK(value.shape() == std::array<Index, 2>{3, 4});
        },
        "router.", router);
    CHECK(names == std::vector<std::string>{"router.routing_token"});
    const Random random = same.next();
    for (Index i = 0; i < 12; ++i)
        CHECK(router.routing_token.data()[i] == random.normal(static_cast<std::uint64_t>(i)));
}

TEST_CASE_TEMPLATE("routers: routing tokens that a call is given take the place of the parameter", R,
                   Of<RouterType::coor_descent, double>, Of<RouterType::cum_softmax, double>,
                   Of<RouterType::sinkhorn, double>) {
    const Cpu policy(1);
    SeedSequence seeds(Seed{3});
    R router(policy, seeds);
    if constexpr (requires { router.noise; }) router.noise.source = GumbelNoise<double>::Source::none;
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 9, 4}, 0);
    const auto d_scores = normal<double>(policy, std::array<Index, 3>{2, 3, 5}, 1);
    HostTensor<double, 3> given(policy, {2, 3, 4});
    for (Index b = 0; b < 2; ++b) std::copy_n(router.routing_token.data(), 12, given.view()[b].data());

    const auto gradients_of = [&](const auto& saved, auto... tokens) {
        typename R::Gradients gradients{filled<double>(policy, router.routing_token.shape(), 0)};
        auto d_x = filled<double>(policy, x.shape(), 0);
        router.backward(policy, saved, d_scores.const_view(), x.const_view(), {}, d_x.view(), gradients, tokens...);
        return std::pair{std::move(d_x), std::move(gradients)};
    };
    const auto learned = router.forward(policy, x.const_view(), {}, 5);
    const auto of_learned = gradients_of(learned);

    const auto same = router.forward(policy, x.const_view(), {}, 5, given.const_view());
    auto d_given = filled<double>(policy, given.shape(), 0);
    const auto of_given = gradients_of(same, given.const_view(), d_given.view());
    CHECK(same_bits(same.routing.indices, learned.routing.indices));
    CHECK(same_bits(same.routing.scores, learned.routing.scores));
    CHECK(relative_error(of_given.first, of_learned.first) <= 1e-14);
    CHECK(inner(of_given.second.routing_token, of_given.second.routing_token) == 0);
    for (Index i = 0; i < 12; ++i)
        CHECK(d_given.data()[i] + d_given.data()[12 + i] ==
              doctest::Approx(of_learned.second.routing_token.data()[i]).epsilon(1e-12));
    CHECK(inner(d_given, d_given) > 0);

    for (Index i = 0; i < 12; ++i) given.data()[12 + i] *= -1;  // the second sample chooses the other end
    const auto other = router.route(policy, x.const_view(), {}, 5, given.const_view());
    CHECK(same_bits(sequence(other.indices, 0), sequence(learned.routing.indices, 0)));
    CHECK(!same_bits(sequence(other.indices, 1), sequence(learned.routing.indices, 1)));
    CHECK_THROWS_WITH_AS(router.route(policy, x.const_view(), {}, 5, d_scores.const_view()),
                         "colt5: `routing_tokens` must have shape (2, 3, 4), but has (2, 3, 5)", ShapeError);
}
