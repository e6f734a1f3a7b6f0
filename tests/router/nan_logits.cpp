// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <limits>

#include "router/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr RouterConfig with(bool straight_through, bool converged = false) {
    return {.dim = 4,
            .num_routing_tokens = 2,
            .straight_through = straight_through,
            .kwargs = {.coor_descent = {.iterate_to_convergence = converged}}};
}
template <RouterType type, RouterConfig config>
using Of = typename RouterOf<type>::template type<config, float, Cpu>;

}  // namespace

TEST_CASE_TEMPLATE("routers: a NaN logit of a real token makes its row NaN and nothing else, both ways", R,
                   Of<RouterType::coor_descent, with(false)>, Of<RouterType::coor_descent, with(true)>,
                   Of<RouterType::coor_descent, with(false, true)>, Of<RouterType::coor_descent, with(true, true)>,
                   Of<RouterType::cum_softmax, with(false)>, Of<RouterType::cum_softmax, with(true)>,
                   Of<RouterType::sinkhorn, with(false)>, Of<RouterType::sinkhorn, with(true)>) {
    const Cpu policy(1);
    constexpr Index length = 21, k = 5;
    const auto router = make_router<R>(policy);
    const auto clean = normal<float>(policy, std::array<Index, 3>{3, length, 4}, 0);
    constexpr float nan = std::numeric_limits<float>::quiet_NaN();
    for (const Index at : {0, 1, 11, 20}) {
        CAPTURE(at);
        HostTensor<bool, 2> mask(policy, {3, length});  // masks the tokens 3, 10 and 17 of each sequence
        fill_with(policy, mask, [](std::size_t i) { return i % 7 != 3; });
        auto x = copy_of(policy, clean);
        x.view()(0, at, 2) = nan;
        for (const Index masked : {3, 10, 17}) x.view()(1, masked, 0) = nan;
        const auto routing = router.route(policy, x.const_view(), mask.const_view(), k);
        const auto expected = router.route(policy, clean.const_view(), mask.const_view(), k);
        const auto saved = router.forward(policy, x.const_view(), mask.const_view(), k);
        const auto d_scores = filled<float>(policy, routing.scores.shape(), 1);
        const auto d_logits = router.d_logits(policy, saved, d_scores.const_view(), mask.const_view());
        for (Index r = 0; r < 2; ++r) {
            for (Index i = 0; i < k; ++i) {
                CHECK(std::isnan(routing.scores.const_view()(0, r, i)));
                CHECK(std::isnan(saved.routing.scores.const_view()(0, r, i)));
                CHECK(mask.view()(0, routing.indices.const_view()(0, r, i)));
                for (const Index b : {1, 2}) {
                    CHECK(routing.scores.const_view()(b, r, i) == expected.scores.const_view()(b, r, i));
                    CHECK(routing.indices.const_view()(b, r, i) == expected.indices.const_view()(b, r, i));
                }
            }
            for (Index i = 0; i < length; ++i) {
                const bool real = mask.view()(0, i);
                CHECK((real ? std::isnan(d_logits.const_view()(0, r, i)) : d_logits.const_view()(0, r, i) == 0));
                for (const Index b : {1, 2}) CHECK(std::isfinite(d_logits.const_view()(b, r, i)));
            }
        }
        // With fewer real tokens than picks, the masked ones score 0 all the same.
        for (Index i = 0; i < length; ++i) mask.view()(0, i) = i == at;
        const auto few = router.route(policy, x.const_view(), mask.const_view(), k);
        for (Index r = 0; r < 2; ++r)
            for (Index i = 0; i < k; ++i)
                CHECK((i == 0 ? std::isnan(few.scores.const_view()(0, r, i)) : few.scores.const_view()(0, r, i) == 0));
    }
}
