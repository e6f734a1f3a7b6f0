// SPDX-License-Identifier: MIT
#include <colt5/router/router.hpp>

#include "router/checks.hpp"
#include "router/norm_router.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr RouterConfig soft{.dim = 5, .num_routing_tokens = 2, .straight_through = false};
constexpr RouterConfig straight{.dim = 5, .num_routing_tokens = 2};

// All that a router needs, but for one thing each.
template <RouterConfig config, typename Scalar, typename P>
struct WithoutBackward : NormRouter<config, Scalar, P> {
    using NormRouter<config, Scalar, P>::NormRouter;
    void backward() = delete;
};
template <RouterConfig config, typename Scalar, typename P>
struct NotFromSeeds : NormRouter<config, Scalar, P> {
    explicit NotFromSeeds(const P& policy) : NormRouter<config, Scalar, P>(policy, {}) {}
};
template <RouterConfig config, typename Scalar, typename P>
struct IntegerScores : NormRouter<config, Scalar, P> {
    using NormRouter<config, Scalar, P>::NormRouter;
    Routing<int, P> route(const P&, TokensView<const Scalar>, Mask, Index) const;
};

static_assert(Router<NormRouter<straight, float, Cpu>, float, Cpu>);
static_assert(Router<NormRouter<straight, double, Cpu>, double, Cpu>);
static_assert(!Router<NormRouter<straight, double, Cpu>, float, Cpu>);
static_assert(!Router<WithoutBackward<straight, float, Cpu>, float, Cpu>);
static_assert(!Router<NotFromSeeds<straight, float, Cpu>, float, Cpu>);
static_assert(!Router<IntegerScores<straight, float, Cpu>, float, Cpu>);

}  // namespace

TEST_CASE("Router: a user's router has the gradients of finite differences") {
    const Cpu policy(1);
    auto router = make_router<NormRouter<soft, double, Cpu>>(policy);
    auto x = normal<double>(policy, std::array<Index, 3>{2, 7, 5}, 0);
    const auto some = random_mask(policy, std::array<Index, 2>{2, 7}, 1);
    for (const Mask mask : {Mask(), some.const_view()}) {
        const auto saved = router.forward(policy, x.const_view(), mask, 3);
        const auto d_scores = normal<double>(policy, saved.routing.scores.shape(), 2);
        auto d_x = filled<double>(policy, x.shape(), 0);
        auto gradients = zeros_like_parameters(policy, router);
        router.backward(policy, saved, d_scores.const_view(), x.const_view(), mask, d_x.view(), gradients);
        const auto loss = [&] { return inner(d_scores, router.route(policy, x.const_view(), mask, 3).scores); };
        CHECK(relative_error(d_x, finite_differences(policy, x, loss)) <= 1e-8);
        CHECK(relative_error(gradients.weight, finite_differences(policy, router.weight, loss)) <= 1e-8);
    }
}

TEST_CASE("Router: single_route sees one route as (b, k), and refuses several") {
    const Cpu policy(1);
    const auto one = normal<float>(policy, std::array<Index, 3>{2, 1, 3}, 0);
    CHECK(single_route(one).shape() == std::array<Index, 2>{2, 3});
    CHECK(single_route(one).data() == one.data());
    const auto two = normal<float>(policy, std::array<Index, 3>{2, 2, 3}, 0);
    CHECK_THROWS_WITH_AS(single_route(two), "colt5: `routing` must have shape (any, 1, any), but has (2, 2, 3)",
                         ShapeError);
}
