// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <numeric>

#include <colt5/cpu/causal_key_counts.hpp>
#include <colt5/cpu/causal_top_k.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

TEST_CASE("causal_key_counts: counts the live keys at each live query's position or before") {
    const Cpu policy(2);
    const CausalTopK how{.rate = 0.3, .block_size = 8};
    for (const std::array<Index, 2> routes : {std::array<Index, 2>{1, 1}, {2, 1}, {1, 3}, {2, 3}, {4, 2}})
        for (const Index null_keys : {0, 1})
            for (const Index length : {1, 37}) {
                CAPTURE(shape_string(routes));
                CAPTURE(length);
                const auto q = causal_top_k(policy, how,
                                            normal<float>(policy, std::array{Index{2}, routes[0], length}, 0), {}, 100);
                const auto k =
                    causal_top_k(policy, how, normal<float>(policy, std::array{Index{2}, routes[1], length}, 1), {}, 9);
                const auto counts = causal_key_counts(policy, {q.indices.const_view(), q.live.const_view()},
                                                      {k.indices.const_view(), k.live.const_view()}, null_keys);
                const auto of_all = causal_key_counts(policy, {q.indices.const_view(), {}},
                                                      {k.indices.const_view(), k.live.const_view()}, null_keys);
                const Index groups = std::lcm(routes[0], routes[1]);
                REQUIRE(counts.shape() == std::array{Index{2}, groups, q.indices.extent(2)});
                for (Index b = 0; b < 2; ++b)
                    for (Index g = 0; g < groups; ++g)
                        for (Index i = 0; i < q.indices.extent(2); ++i) {
                            const Index query_route = g / (groups / routes[0]), key_route = g / (groups / routes[1]);
                            Index seen = null_keys;
                            for (Index j = 0; j < k.indices.extent(2); ++j)
                                seen += k.live.const_view()(b, key_route, j) &&
                                        k.indices.const_view()(b, key_route, j) <=
                                            q.indices.const_view()(b, query_route, i);
                            CHECK(of_all.const_view()(b, g, i) == seen);
                            CHECK(counts.const_view()(b, g, i) == (q.live.const_view()(b, query_route, i) ? seen : 0));
                        }
            }
}

TEST_CASE("causal_key_counts: errors name the argument and both shapes or values") {
    const Cpu policy(1);
    const TokensTensor<TokenIndex, Cpu> two(policy, {2, 1, 3}), three(policy, {3, 1, 3});
    const TokensTensor<bool, Cpu> longer(policy, {2, 1, 4});
    CHECK_THROWS_WITH_AS(causal_key_counts(policy, {two.const_view(), {}}, {three.const_view(), {}}),
                         "colt5: `keys.positions` must have shape (2, any, any), but has (3, 1, 3)", ShapeError);
    CHECK_THROWS_WITH_AS(causal_key_counts(policy, {two.const_view(), longer.const_view()}, {two.const_view(), {}}),
                         "colt5: `queries.live` must have shape (2, 1, 3), but has (2, 1, 4)", ShapeError);
    CHECK_THROWS_WITH_AS(causal_key_counts(policy, {two.const_view(), {}}, {two.const_view(), longer.const_view()}),
                         "colt5: `keys.live` must have shape (2, 1, 3), but has (2, 1, 4)", ShapeError);
    CHECK_THROWS_WITH_AS(causal_key_counts(policy, {two.const_view(), {}}, {two.const_view(), {}}, -1),
                         "colt5: `null_keys` must be >= 0, but is -1", ValueError);
    const TokensTensor<TokenIndex, Cpu> no_routes(policy, {2, 0, 3});
    CHECK_THROWS_WITH_AS(causal_key_counts(policy, {no_routes.const_view(), {}}, {two.const_view(), {}}),
                         "colt5: `queries.positions` must be of at least one route, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(causal_key_counts(policy, {two.const_view(), {}}, {no_routes.const_view(), {}}),
                         "colt5: `keys.positions` must be of at least one route, but is 0", ValueError);
}
