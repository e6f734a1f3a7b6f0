// SPDX-License-Identifier: MIT
#include <colt5/optim/schedule.hpp>

#include <cmath>

#include <doctest/doctest.h>

using namespace colt5;

TEST_CASE("schedule: up in a line, down along half a cosine, then flat") {
    const WarmupCosine schedule{.peak = 0.8, .warmup = 4, .total = 12, .floor = 0.2};
    CHECK(warmup_cosine(0, schedule) == doctest::Approx(0.2));
    CHECK(warmup_cosine(1, schedule) == doctest::Approx(0.4));
    CHECK(warmup_cosine(3, schedule) == doctest::Approx(0.8));
    CHECK(warmup_cosine(4, schedule) == doctest::Approx(0.8));
    CHECK(warmup_cosine(6, schedule) == doctest::Approx(0.5 + 0.3 * 0.7071067811865476));
    CHECK(warmup_cosine(8, schedule) == doctest::Approx(0.5));
    CHECK(warmup_cosine(12, schedule) == doctest::Approx(0.2));
    CHECK(warmup_cosine(1000, schedule) == doctest::Approx(0.2));
}

TEST_CASE("schedule: without warm-up it starts at the peak") {
    CHECK(warmup_cosine(0, {.peak = 0.5, .total = 10}) == doctest::Approx(0.5));
    CHECK(warmup_cosine(5, {.peak = 0.5, .total = 10}) == doctest::Approx(0.25));
}

TEST_CASE("schedule: steps out of range") {
    CHECK_THROWS_WITH_AS(warmup_cosine(0, {.warmup = -1}), "colt5: `warmup` must be >= 0, but is -1", ValueError);
    CHECK_THROWS_WITH_AS(warmup_cosine(0, {.warmup = 5, .total = 5}),
                         "colt5: `total` must be more than warmup, but is 5", ValueError);
    CHECK_THROWS_WITH_AS(warmup_cosine(-1, {}), "colt5: `step` must be >= 0, but is -1", ValueError);
    CHECK_THROWS_WITH_AS(warmup_cosine(0, {.peak = std::nan("")}), "colt5: `peak` must be in [0, 1e6], but is nan",
                         ValueError);
    CHECK_THROWS_WITH_AS(warmup_cosine(0, {.floor = 1e300}), "colt5: `floor` must be in [0, 1e6], but is 1e+300",
                         ValueError);
}

TEST_CASE("schedule: up in a line or at the peak, then one over the root of the step") {
    const WarmupInverseSqrt schedule{.peak = 0.8, .warmup = 4};
    CHECK(warmup_inverse_sqrt(0, schedule) == doctest::Approx(0.2));
    CHECK(warmup_inverse_sqrt(2, schedule) == doctest::Approx(0.6));
    CHECK(warmup_inverse_sqrt(3, schedule) == doctest::Approx(0.8));
    CHECK(warmup_inverse_sqrt(15, schedule) == doctest::Approx(0.4));
    CHECK(warmup_inverse_sqrt(399, schedule) == doctest::Approx(0.08));
    // T5: 1 / sqrt(max(step, 10000))
    const WarmupInverseSqrt of_t5{.peak = 0.01, .warmup = 10000, .linear = false};
    CHECK(warmup_inverse_sqrt(0, of_t5) == 0.01);
    CHECK(warmup_inverse_sqrt(9999, of_t5) == doctest::Approx(0.01));
    CHECK(warmup_inverse_sqrt(39999, of_t5) == doctest::Approx(0.005));
    CHECK_THROWS_WITH_AS(warmup_inverse_sqrt(0, {.warmup = 0}), "colt5: `warmup` must be >= 1, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(warmup_inverse_sqrt(-1, {}), "colt5: `step` must be >= 0, but is -1", ValueError);
    CHECK_THROWS_WITH_AS(warmup_inverse_sqrt(0, {.peak = -1}), "colt5: `peak` must be in [0, 1e6], but is -1",
                         ValueError);
}
