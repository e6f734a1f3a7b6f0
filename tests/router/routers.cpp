// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <string>
#include <type_traits>
#include <vector>

#include <colt5/colt5.hpp>

using namespace colt5;

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
