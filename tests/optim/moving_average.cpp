// SPDX-License-Identifier: MIT
#include <colt5/optim/moving_average.hpp>

#include <algorithm>
#include <cmath>
#include <vector>

#include <doctest/doctest.h>

#include <colt5/cpu/expr.hpp>

#include "optim/tiny_module.hpp"

using namespace colt5;

namespace {

const Cpu policy{1};

template <typename T>
std::vector<double> numbers(const T& tensor) {
    std::vector<double> all;
    for (const auto value : to_host(policy, tensor)) all.push_back(static_cast<double>(value));
    return all;
}

}  // namespace

TEST_CASE_TEMPLATE("moving average: against a loop in double", T, float, double, bfloat16) {
    for (const MovingAverageOptions options : {MovingAverageOptions{.decay = 0.9}, {.decay = 0.5, .warms_up = false}}) {
        TinyModule<T> module(policy, 3, 5);
        MovingAverage<TinyModule<T>> average(policy, module, options);
        auto expected = numbers(module.weight);
        for (int step = 0; step < 40; ++step) {
            fill_normal(policy, module.weight, Random(Seed{2}, static_cast<std::uint64_t>(step)));
            average.update(module);
            const double decay =
                options.warms_up ? std::min(options.decay, (1.0 + step) / (10.0 + step)) : options.decay;
            const auto now = numbers(module.weight);
            for (std::size_t i = 0; i < now.size(); ++i) expected[i] = decay * expected[i] + (1 - decay) * now[i];
        }
        CHECK(average.state().updates == 40);
        const auto found = numbers(average.state().average.weight);
        for (std::size_t i = 0; i < found.size(); ++i)
            CHECK(found[i] == doctest::Approx(expected[i]).epsilon(std::is_same_v<T, double> ? 1e-13 : 1e-5));
    }
}

TEST_CASE_TEMPLATE("moving average: swapped in and out, bit for bit", T, float, double, bfloat16) {
    TinyModule<T> module(policy, 3, 5);
    MovingAverage<TinyModule<T>> average(policy, module);
    fill_normal(policy, module.weight, Random(Seed{2}));
    average.update(module);
    const auto weight = numbers(module.weight), gamma = numbers(module.gamma);
    const auto of_weight = numbers(average.state().average.weight);
    for (int time = 0; time < 2; ++time) {
        average.swap_in(module);
        CHECK(average.is_swapped_in());
        const auto now = numbers(module.weight);
        CHECK(now != weight);
        for (std::size_t i = 0; i < now.size(); ++i) CHECK(now[i] == static_cast<double>(T(of_weight[i])));
        CHECK_THROWS_WITH_AS(average.swap_in(module), "colt5: `average` must be swapped out, but is swapped in",
                             ValueError);
        CHECK_THROWS_WITH_AS(average.update(module), "colt5: `average` must be swapped out, but is swapped in",
                             ValueError);
        average.swap_out(module);
        CHECK(numbers(module.weight) == weight);
        CHECK(numbers(module.gamma) == gamma);
        CHECK(numbers(average.state().average.weight) == of_weight);
        CHECK_THROWS_WITH_AS(average.swap_out(module), "colt5: `average` must be swapped in, but is swapped out",
                             ValueError);
    }
}

TEST_CASE("moving average: misuse") {
    TinyModule<> module(policy, 3, 5), other(policy, 3, 4);
    CHECK_THROWS_WITH_AS((MovingAverage<TinyModule<>>(policy, module, {.decay = 1})),
                         "colt5: `decay` must be in [0, 1), but is 1", ValueError);
    MovingAverage<TinyModule<>> average(policy, module);
    CHECK_THROWS_AS(average.update(other), ShapeError);
    CHECK_THROWS_AS(average.swap_in(other), ShapeError);
    CHECK(average.state().updates == 0);
}
