// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include <colt5/cpu/relative_position_bias.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

/// T5Attention._relative_position_bucket(r, bidirectional=True) of the package transformers, in float as there.
Index of_transformers(Index r, Index num_buckets, Index max_distance) {
    num_buckets /= 2;
    const Index after = r > 0 ? num_buckets : 0, distance = std::abs(r), max_exact = num_buckets / 2;
    if (distance < max_exact) return after + distance;
    const float logarithm = std::log(static_cast<float>(distance) / static_cast<float>(max_exact));
    const auto base = static_cast<float>(std::log(static_cast<double>(max_distance) / static_cast<double>(max_exact)));
    const Index large = max_exact + static_cast<Index>(logarithm / base * static_cast<float>(num_buckets - max_exact));
    return after + std::min(large, num_buckets - 1);
}

constexpr std::array<std::pair<Index, Index>, 9> sizes{
    {{32, 128}, {32, 64}, {16, 32}, {64, 256}, {64, 128}, {34, 130}, {32, 4096}, {6, 20}, {4, 2}}};

}  // namespace

TEST_CASE("RelativePositionBuckets: where the buckets of T5 begin") {
    const RelativePositionBuckets buckets;
    constexpr std::array<Index, 16> first{0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91};
    for (std::size_t i = 0; i < first.size(); ++i) {
        const auto bucket = static_cast<Index>(i);
        CAPTURE(bucket);
        CHECK(buckets.bucket(-first[i]) == bucket);
        if (i > 0) {
            CHECK(buckets.bucket(first[i]) == 16 + bucket);
            CHECK(buckets.bucket(1 - first[i]) == bucket - 1);
        }
    }
    CHECK(buckets.bucket(-1000000) == 15);
    CHECK(buckets.bucket(1000000) == 31);
}

TEST_CASE("RelativePositionBuckets: the integers of the package transformers") {
    for (const auto& size : sizes) {
        const Index num_buckets = size.first, max_distance = size.second;
        const RelativePositionBuckets buckets{num_buckets, max_distance};
        for (Index r = -2 * max_distance; r <= 2 * max_distance; ++r) {
            CAPTURE(num_buckets);
            CAPTURE(r);
            CHECK(buckets.bucket(r) == of_transformers(r, num_buckets, max_distance));
        }
    }
}

TEST_CASE("relative_position_bias: by distance, and its gradient back in the buckets") {
    const Cpu policy(1);
    for (const auto& size : sizes)
        for (const Index reach : {Index{0}, Index{1}, Index{7}, size.second, size.second + 3, Index{1} << 40}) {
            const Index num_buckets = size.first, max_distance = size.second;
            CAPTURE(num_buckets);
            CAPTURE(reach);
            const RelativePositionBuckets buckets{num_buckets, max_distance};
            auto table = normal<double>(policy, std::array<Index, 2>{num_buckets, 3}, 1);
            const auto bias = relative_position_bias(policy, buckets, table, reach);
            const Index span = std::min(reach, max_distance);
            REQUIRE(bias.shape() == std::array<Index, 2>{3, 2 * span + 1});
            for (Index r = -span; r <= span; ++r)
                for (Index h = 0; h < 3; ++h)
                    CHECK(bias.const_view()(h, span + r) == table.const_view()(buckets.bucket(r), h));

            const auto d_bias = normal<double>(policy, bias.shape(), 2);
            auto d_table = filled<double>(policy, table.shape(), 0);
            relative_position_bias_vjp(policy, buckets, d_bias, d_table.view());
            CHECK(inner(d_table, table) == doctest::Approx(inner(d_bias, bias)).epsilon(1e-12));
            auto twice = copy_of(policy, d_table);
            relative_position_bias_vjp(policy, buckets, d_bias, twice.view());
            CHECK(relative_error(twice, times(policy, d_table, 2)) <= 1e-14);
        }
}

TEST_CASE("relative_position_bias: errors name the argument and both values") {
    const Cpu policy(1);
    const auto table = normal<double>(policy, std::array<Index, 2>{32, 3}, 1);
    CHECK_THROWS_WITH_AS(relative_position_bias(policy, {2, 128}, table, 4),
                         "colt5: `num_buckets` must be at least 4, but is 2", ValueError);
    CHECK_THROWS_WITH_AS(relative_position_bias(policy, {33, 128}, table, 4),
                         "colt5: `num_buckets` must be even, but is 33", ValueError);
    CHECK_THROWS_WITH_AS(relative_position_bias(policy, {32, 8}, table, 4),
                         "colt5: `max_distance` must be more than num_buckets / 4, but is 8", ValueError);
    CHECK_THROWS_WITH_AS(relative_position_bias(policy, {}, table, -1), "colt5: `reach` must be >= 0, but is -1",
                         ValueError);
    CHECK_THROWS_WITH_AS(relative_position_bias(policy, {16, 128}, table, 4),
                         "colt5: `table` must have shape (16, any), but has (32, 3)", ShapeError);
    const auto d_bias = normal<double>(policy, std::array<Index, 2>{3, 9}, 2);
    auto d_table = filled<double>(policy, std::array<Index, 2>{32, 2}, 0);
    CHECK_THROWS_WITH_AS(relative_position_bias_vjp(policy, RelativePositionBuckets{}, d_bias, d_table.view()),
                         "colt5: `d_table` must have shape (32, 3), but has (32, 2)", ShapeError);
}
