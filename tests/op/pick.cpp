// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include <colt5/cpu/pick.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

TokensTensor<TokenIndex, Cpu> indices_of(const Cpu& policy, const std::array<Index, 3>& shape,
                                         std::vector<TokenIndex> values) {
    return from_host<TokensTensor<TokenIndex, Cpu>>(policy, shape, values);
}

}  // namespace

TEST_CASE("pick_scores: the scores of the chosen tokens, 1 without scores, 0 at masked tokens") {
    const Cpu policy(1);
    const auto scores = normal<double>(policy, std::array<Index, 3>{2, 2, 5}, 0);
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 5}, 1, 0.5);
    const auto indices = indices_of(policy, {2, 2, 3}, {0, 4, 2, 1, 2, 3, 4, 3, 2, 0, 1, 4});
    const auto picked = pick_scores<double>(policy, scores.const_view(), indices, {});
    const auto masked = pick_scores<double>(policy, scores.const_view(), indices, Mask(mask));
    const auto ones = pick_scores<double>(policy, {}, indices, {});
    const auto masked_ones = pick_scores<double>(policy, {}, indices, Mask(mask));
    int zeros = 0;
    for (Index b = 0; b < 2; ++b)
        for (Index r = 0; r < 2; ++r)
            for (Index i = 0; i < 3; ++i) {
                const Index token = indices.view()(b, r, i);
                const double score = scores.view()(b, r, token), real = mask.view()(b, token) ? 1 : 0;
                CHECK(picked.view()(b, r, i) == score);
                CHECK(masked.view()(b, r, i) == real * score);
                CHECK(ones.view()(b, r, i) == 1);
                CHECK(masked_ones.view()(b, r, i) == real);
                zeros += real == 0 ? 1 : 0;
            }
    CHECK((zeros > 0 && zeros < 12));
}

TEST_CASE("straight_through_scores: 1, 0 at masked tokens, and NaN in rows whose first choice is NaN") {
    const Cpu policy(1);
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    const auto logits =
        from_host<TokensTensor<double, Cpu>>(policy, {2, 1, 3}, std::vector<double>{1, 3, 2, 1, nan, 2});
    const auto indices =
        from_host<TokensTensor<TokenIndex, Cpu>>(policy, {2, 1, 3}, std::vector<TokenIndex>{1, 2, 0, 1, 2, 0});
    HostTensor<bool, 2> mask(policy, {2, 3});
    fill_with(policy, mask, [](std::size_t i) { return i % 3 != 0; });
    const auto scores = straight_through_scores(policy, logits, indices, {});
    const auto masked = straight_through_scores(policy, logits, indices, Mask(mask));
    for (Index i = 0; i < 3; ++i) {
        CHECK(scores.const_view()(0, 0, i) == 1);
        CHECK(masked.const_view()(0, 0, i) == (i == 2 ? 0 : 1));
        CHECK(std::isnan(scores.const_view()(1, 0, i)));
        CHECK((i == 2 ? masked.const_view()(1, 0, i) == 0 : std::isnan(masked.const_view()(1, 0, i))));
    }
    const auto far = from_host<TokensTensor<TokenIndex, Cpu>>(policy, {2, 1, 1}, std::vector<TokenIndex>{0, 3});
    CHECK_THROWS_WITH_AS(straight_through_scores(policy, logits, far, {}),
                         "colt5: `indices` must be in [0, 3), but is 3", ValueError);
    CHECK_THROWS_WITH_AS(
        straight_through_scores(policy, logits.const_view().reshape(std::array<Index, 3>{1, 2, 3}), indices, {}),
        "colt5: `logits` must have shape (2, 1, any), but has (1, 2, 3)", ShapeError);
}

TEST_CASE("place_scores: its gradient is that of finite differences, and 0 for tokens that are not chosen") {
    const Cpu policy(1);
    auto scores = normal<double>(policy, std::array<Index, 3>{2, 2, 5}, 0);
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 5}, 1, 0.5);
    const auto indices = indices_of(policy, {2, 2, 3}, {0, 4, 2, 1, 2, 3, 4, 3, 2, 0, 1, 4});
    const auto d_picked = normal<double>(policy, indices.shape(), 2);
    for (const Mask given : {Mask{}, Mask(mask)}) {
        const auto d_scores = place_scores(policy, d_picked, indices, given, 5);
        const auto loss = [&] {
            return inner(d_picked, pick_scores<double>(policy, scores.const_view(), indices, given));
        };
        CHECK(relative_error(d_scores, finite_differences(policy, scores, loss)) <= 1e-9);
    }
}

TEST_CASE("pick_scores and place_scores: nothing to pick") {
    const Cpu policy(1);
    const auto scores = normal<double>(policy, std::array<Index, 3>{2, 1, 5}, 0);
    const auto none = indices_of(policy, {2, 1, 0}, {});
    CHECK(pick_scores<double>(policy, scores.const_view(), none, {}).size() == 0);
    for (const double d : to_host(policy, place_scores(policy, filled<double>(policy, none.shape(), 1), none, {}, 5)))
        CHECK(d == 0);
}

TEST_CASE("pick_scores and place_scores: errors name the argument") {
    const Cpu policy(1);
    const auto scores = normal<double>(policy, std::array<Index, 3>{2, 1, 5}, 0);
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 4}, 0);
    const auto good = indices_of(policy, {2, 1, 2}, {0, 1, 2, 3}), far = indices_of(policy, {2, 1, 2}, {0, 1, 2, 5});
    const auto two_routes = indices_of(policy, {2, 2, 1}, {0, 1, 2, 3});
    CHECK_THROWS_WITH_AS(pick_scores<double>(policy, scores.const_view(), far, {}),
                         "colt5: `indices` must be in [0, 5), but is 5", ValueError);
    CHECK_THROWS_WITH_AS(pick_scores<double>(policy, {}, far, Mask(mask)),
                         "colt5: `indices` must be in [0, 4), but is 5", ValueError);
    CHECK_THROWS_WITH_AS(pick_scores<double>(policy, scores.const_view(), two_routes, {}),
                         "colt5: `scores` must have shape (2, 2, any), but has (2, 1, 5)", ShapeError);
    CHECK_THROWS_WITH_AS(pick_scores<double>(policy, scores.const_view(), good, Mask(mask)),
                         "colt5: `mask` must have shape (2, 5), but has (2, 4)", ShapeError);
    const auto d_picked = filled<double>(policy, good.shape(), 1);
    CHECK_THROWS_WITH_AS(place_scores(policy, scores, good, {}, 5),
                         "colt5: `d_picked` must have shape (2, 1, 2), but has (2, 1, 5)", ShapeError);
    CHECK_THROWS_WITH_AS(place_scores(policy, d_picked, far, {}, 5), "colt5: `indices` must be in [0, 5), but is 5",
                         ValueError);
    CHECK_THROWS_WITH_AS(place_scores(policy, d_picked, good, Mask(mask), 5),
                         "colt5: `mask` must have shape (2, 5), but has (2, 4)", ShapeError);
}
