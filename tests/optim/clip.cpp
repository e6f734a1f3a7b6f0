// SPDX-License-Identifier: MIT
#include <colt5/optim/clip.hpp>

#include <cmath>
#include <limits>
#include <vector>

#include <doctest/doctest.h>

#include <colt5/cpu/global_norm.hpp>
#include <colt5/cpu/zero.hpp>

#include "optim/tiny_module.hpp"

using namespace colt5;

namespace {

template <typename T>
struct Case {
    Case(const Cpu& where, Index rows, Index columns) : module(where, rows, columns), policy(where) {
        gradients = module.make_gradients();
        fill_normal(policy, gradients.weight, Random(Seed{8}, 0));
        fill_normal(policy, gradients.gamma, Random(Seed{8}, 1));
    }
    std::vector<T> values() const {
        std::vector<T> all = to_host(policy, gradients.weight);
        for (const T value : to_host(policy, gradients.gamma)) all.push_back(value);
        return all;
    }
    double naive_norm() const {
        long double squares = 0;
        for (const T value : values()) squares += static_cast<long double>(value) * static_cast<long double>(value);
        return static_cast<double>(std::sqrt(squares));
    }

    TinyModule<T> module;
    typename TinyModule<T>::Gradients gradients;
    Cpu policy;
};

template <typename T>
void check_clip(Index rows, Index columns, double max_norm, double tolerance) {
    CAPTURE(rows);
    CAPTURE(columns);
    const Cpu policy{2};
    Case<T> test(policy, rows, columns);
    const auto before = test.values();
    const double norm = test.naive_norm();
    CHECK(gradient_norm<TinyModule<T>>(policy, test.gradients) == doctest::Approx(norm).epsilon(1e-14));
    CHECK(clip_gradient_norm<TinyModule<T>>(policy, test.gradients, max_norm) == doctest::Approx(norm).epsilon(1e-14));
    const double factor = std::min(1.0, max_norm / (norm + 1e-6));
    const auto after = test.values();
    for (std::size_t i = 0; i < after.size(); ++i)
        CHECK(static_cast<double>(after[i]) ==
              doctest::Approx(factor * static_cast<double>(before[i])).epsilon(tolerance));
    if (factor == 1) CHECK(after == before);
}

}  // namespace

TEST_CASE("clip: norm and factor equal plain loops") {
    check_clip<double>(3, 5, 0.5, 1e-14);
    check_clip<double>(1, 1, 1e-3, 1e-14);
    check_clip<double>(50, 700, 2, 1e-14);
    check_clip<float>(3, 5, 0.5, 2e-7);
    check_clip<float>(37, 443, 1, 2e-7);
    check_clip<float>(3, 5, 1e6, 1e-15);  // below the limit: not a bit changes
    check_clip<float>(0, 5, 1, 2e-7);
    check_clip<float>(0, 0, 1, 1e-15);
}

TEST_CASE("clip: the same bits with any number of threads") {
    std::vector<double> norms;
    std::vector<std::vector<float>> results;
    for (const int threads : {1, 2, 5}) {
        Case<float> test(Cpu{threads}, 100, 1001);
        norms.push_back(clip_gradient_norm<TinyModule<>>(test.policy, test.gradients, 1));
        results.push_back(test.values());
    }
    CHECK(norms[0] == norms[1]);
    CHECK(norms[0] == norms[2]);
    CHECK(results[0] == results[1]);
    CHECK(results[0] == results[2]);
}

TEST_CASE("clip: squares that float cannot hold") {
    const Cpu policy{1};
    Case<float> test(policy, 2, 2);
    fill(policy, test.gradients.gamma, 0);
    fill(policy, test.gradients.weight, 1e30);
    CHECK(clip_gradient_norm<TinyModule<>>(policy, test.gradients, 2) == doctest::Approx(2e30).epsilon(1e-6));
    CHECK(test.values()[0] == doctest::Approx(1.0).epsilon(1e-6));
    fill(policy, test.gradients.weight, 1e-30);
    CHECK(gradient_norm<TinyModule<>>(policy, test.gradients) == doctest::Approx(2e-30).epsilon(1e-6).scale(1e-30));
}

TEST_CASE("clip: squares that double cannot hold") {
    const Cpu policy{2};
    Case<double> unit(policy, 37, 5);
    const double norm = unit.naive_norm();
    for (const double scale : {0x1p520, 0x1p1015, 0x1p-560, 0x1p-1000}) {
        CAPTURE(scale);
        Case<double> test(policy, 37, 5);
        colt5::scale(policy, test.gradients.weight, scale);
        colt5::scale(policy, test.gradients.gamma, scale);
        CHECK(gradient_norm<TinyModule<double>>(policy, test.gradients) / scale ==
              doctest::Approx(norm).epsilon(1e-14));
        if (scale < 1) continue;
        clip_gradient_norm<TinyModule<double>>(policy, test.gradients, norm);
        for (std::size_t i = 0; i < test.values().size(); ++i)
            CHECK(test.values()[i] == doctest::Approx(unit.values()[i]).epsilon(1e-14));
    }
}

TEST_CASE("clip: the largest gradients of float, whose factor is not a normal float") {
    const Cpu policy{1};
    Case<float> test(policy, 100, 100);
    fill(policy, test.gradients.gamma, 0);
    fill(policy, test.gradients.weight, 0x1p127);
    CHECK(clip_gradient_norm<TinyModule<>>(policy, test.gradients, 1e-3) == doctest::Approx(100 * 0x1p127));
    CHECK(test.values()[0] == doctest::Approx(1e-5).epsilon(1e-6).scale(1e-5));
}

TEST_CASE("clip: gradients that are not finite stay as they are") {
    const Cpu policy{1};
    for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
        Case<float> test(policy, 2, 3);
        test.gradients.weight.data()[4] = bad;
        const auto before = test.values();
        CHECK_FALSE(std::isfinite(clip_gradient_norm<TinyModule<>>(policy, test.gradients, 0.1)));
        const auto after = test.values();
        for (std::size_t i = 0; i < after.size(); ++i)
            if (i != 4) CHECK(after[i] == before[i]);
    }
}

TEST_CASE("clip: a limit below zero") {
    Case<float> test(Cpu{1}, 1, 1);
    CHECK_THROWS_WITH_AS(clip_gradient_norm<TinyModule<>>(test.policy, test.gradients, -1),
                         "colt5: `max_norm` must be >= 0, but is -1", ValueError);
}

TEST_CASE("zero_gradients: zeros, whatever was there") {
    Case<float> test(Cpu{1}, 3, 4);
    test.gradients.weight.data()[0] = std::numeric_limits<float>::quiet_NaN();
    zero_gradients<TinyModule<>>(test.policy, test.gradients);
    CHECK(test.values() == std::vector<float>(16, 0.0f));
}

TEST_CASE("gradients: their type says whose they are, and the module can be named") {
    Case<float> test(Cpu{1}, 3, 4);
    const double norm = test.naive_norm();
    CHECK(gradient_norm(test.policy, test.gradients) == doctest::Approx(norm).epsilon(1e-14));
    CHECK(clip_gradient_norm(test.policy, test.gradients, 1) == doctest::Approx(norm).epsilon(1e-14));
    CHECK(gradient_norm<TinyModule<>>(test.policy, test.gradients) == doctest::Approx(1).epsilon(1e-6));
    zero_gradients(test.policy, test.gradients);
    CHECK(test.values() == std::vector<float>(16, 0.0f));
}

TEST_CASE("gradients: those that nobody has made are refused before any of them changes") {
    Case<float> test(Cpu{1}, 3, 4);
    test.gradients.gamma = {};
    const auto before = test.values();
    const char* const message = "colt5: `gradients.norm.gamma` must be a tensor, as of make_gradients(), but is empty";
    CHECK_THROWS_WITH_AS(gradient_norm(test.policy, test.gradients), message, ValueError);
    CHECK_THROWS_WITH_AS(clip_gradient_norm(test.policy, test.gradients, 1e-3), message, ValueError);
    CHECK_THROWS_WITH_AS(zero_gradients(test.policy, test.gradients), message, ValueError);
    CHECK(test.values() == before);
}
