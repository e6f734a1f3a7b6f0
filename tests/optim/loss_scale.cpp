// SPDX-License-Identifier: MIT
#include <colt5/optim/loss_scale.hpp>

#include <cmath>
#include <limits>
#include <vector>

#include <doctest/doctest.h>

#include <colt5/cpu/global_norm.hpp>
#include <colt5/cpu/zero.hpp>

#include "optim/tiny_module.hpp"

using namespace colt5;

TEST_CASE("loss scale: gradients are divided exactly, and the scale grows") {
    const Cpu policy{1};
    TinyModule<float16> module(policy, 3, 5);
    auto gradients = module.make_gradients();
    LossScale loss_scale({.initial = 1024, .growth_interval = 3, .most = 4096});
    for (const double scale : {1024, 1024, 1024, 2048, 2048, 2048, 4096, 4096, 4096, 4096}) {
        CHECK(loss_scale.scale() == scale);
        fill_normal(policy, gradients.weight, Random(Seed{2}));
        const auto before = to_host(policy, gradients.weight);
        CHECK(loss_scale.unscale(policy, gradients));
        const auto after = to_host(policy, gradients.weight);
        for (std::size_t i = 0; i < after.size(); ++i) CHECK(static_cast<double>(after[i]) * scale == before[i]);
    }
    CHECK(loss_scale.state().skipped == 0);
}

TEST_CASE("loss scale: a step whose gradients are not finite is to be skipped, and the scale falls") {
    const Cpu policy{1};
    TinyModule<float16> module(policy, 3, 5);
    auto gradients = module.make_gradients();
    LossScale loss_scale({.initial = 8, .growth_interval = 3, .least = 2});
    CHECK(loss_scale.unscale(policy, gradients));
    for (const float bad : {std::numeric_limits<float>::infinity(), std::nanf(""), -INFINITY}) {
        fill(policy, gradients.weight, 1);
        gradients.gamma.data()[2] = bad;
        CHECK(!loss_scale.unscale(policy, gradients));
        CHECK(loss_scale.state().finite_steps == 0);
        CHECK(to_host(policy, gradients.weight) == std::vector<float>(15, 1));
    }
    CHECK(loss_scale.scale() == 2);  // 8, 4, 2 and not below
    CHECK(loss_scale.state().skipped == 3);
    fill(policy, gradients.gamma, 3e38);  // finite, though its squares are not
    CHECK(loss_scale.unscale(policy, gradients));
}

TEST_CASE("loss scale: options out of range") {
    CHECK_THROWS_WITH_AS(LossScale({.initial = 0.5}), "colt5: `initial` must be in [least, most], but is 0.5",
                         ValueError);
    CHECK_THROWS_WITH_AS(LossScale({.growth = 0.5}), "colt5: `growth` must be in [1, 1e6], but is 0.5", ValueError);
    CHECK_THROWS_WITH_AS(LossScale({.backoff = 2}), "colt5: `backoff` must be in (0, 1], but is 2", ValueError);
    CHECK_THROWS_WITH_AS(LossScale({.growth_interval = 0}), "colt5: `growth_interval` must be >= 1, but is 0",
                         ValueError);
    CHECK_THROWS_WITH_AS(LossScale({.least = 0}), "colt5: `least` must be positive and finite, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(LossScale({.most = 0.5}), "colt5: `most` must be in [least, 2^100], but is 0.5", ValueError);
}
