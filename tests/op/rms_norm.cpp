// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <limits>

#include <colt5/cpu/rms_norm.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

// Rows around the chunks of 128, widths around the lanes of a batch.
constexpr std::array<std::array<Index, 3>, 11> shapes{{{1, 1, 1},
                                                       {1, 2, 3},
                                                       {2, 3, 4},
                                                       {2, 5, 7},
                                                       {1, 127, 8},
                                                       {1, 128, 15},
                                                       {3, 43, 16},
                                                       {1, 300, 17},
                                                       {1, 3, 515},
                                                       {0, 3, 4},
                                                       {2, 0, 4}}};

template <typename T>
struct Case {
    Case(const Cpu& policy, const std::array<Index, 3>& shape)
        : x(normal<T>(policy, shape, 0)),
          gamma(normal<T>(policy, std::array{shape[2]}, 1)),
          d_y(normal<T>(policy, shape, 2)) {}
    HostTensor<T, 3> x;
    HostTensor<T, 1> gamma;
    HostTensor<T, 3> d_y;
};

auto naive(const Cpu& policy, const Case<double>& c) {
    auto y = tensor_like(policy, c.x);
    const auto x = c.x.view().rows();
    const Index d = x.extent(1);
    for (Index i = 0; i < x.extent(0); ++i) {
        double square = 0;
        for (Index j = 0; j < d; ++j) square += x(i, j) * x(i, j);
        const double norm = std::max(std::sqrt(square), 1e-12);
        for (Index j = 0; j < d; ++j)
            y.view().rows()(i, j) = x(i, j) / norm * std::sqrt(static_cast<double>(d)) * c.gamma.view()(j);
    }
    return y;
}

}  // namespace

TEST_CASE("rms_norm: agrees with a loop in double and float") {
    const Cpu policy(2);
    for (const auto& shape : shapes) {
        CAPTURE(shape_string(shape));
        const Case<double> c(policy, shape);
        const Case<float> f(policy, shape);
        const auto expected = naive(policy, c);
        CHECK(relative_error(rms_norm(policy, c.x, c.gamma), expected) <= 1e-14);
        CHECK(relative_error(rms_norm(policy, f.x, f.gamma), expected) <= 1e-6);
    }
}

TEST_CASE("rms_norm: the gradients are those of finite differences; that of gamma accumulates") {
    const Cpu policy(1);
    for (const auto& shape : shapes) {
        CAPTURE(shape_string(shape));
        Case<double> c(policy, shape);
        auto d_gamma = filled<double>(policy, c.gamma.shape(), 2);
        const auto d_x = rms_norm_vjp(policy, c.d_y, c.x, c.gamma, d_gamma.view());
        const auto before = copy_of(policy, d_gamma);
        rms_norm_vjp(policy, c.d_y, c.x, c.gamma, d_gamma.view());
        for (Index j = 0; j < d_gamma.size(); ++j) {
            CHECK(d_gamma.data()[j] - 2 == doctest::Approx(2 * (before.data()[j] - 2)).epsilon(1e-12));
            d_gamma.data()[j] = before.data()[j] - 2;
        }
        const auto loss = [&] { return inner(c.d_y, rms_norm(policy, c.x, c.gamma)); };
        if (shape[2] == 1) {  // y = ±gamma: the gradient is 0, exactly up to rounding
            for (const double d : to_host(policy, d_x)) CHECK(std::abs(d) <= 1e-14);
        } else if (c.x.size() < 200) {
            CHECK(relative_error(d_x, finite_differences(policy, c.x, loss)) <= 1e-7);
        } else {
            CHECK(directional_error(policy, c.x, d_x, loss) <= 1e-7);
        }
        CHECK(relative_error(d_gamma, finite_differences(policy, c.gamma, loss)) <= 1e-7);

        const Case<float> f(policy, shape);
        auto d_gamma_f = filled<float>(policy, c.gamma.shape(), 0);
        const auto d_x_f = rms_norm_vjp(policy, f.d_y, f.x, f.gamma, d_gamma_f.view());
        if (shape[2] > 1) CHECK(relative_error(d_x_f, d_x) <= 4e-6);
        CHECK(relative_error(d_gamma_f, d_gamma) <= 4e-6);
    }
}

TEST_CASE("rms_norm: rows of zeros, and rows whose norm is below the floor") {
    const Cpu policy(1);
    Case<double> c(policy, {1, 2, 5});
    for (Index j = 0; j < 5; ++j) {
        c.x.data()[j] = 0;
        c.x.data()[5 + j] *= 1e-15;
    }
    CHECK(relative_error(rms_norm(policy, c.x, c.gamma), naive(policy, c)) <= 1e-14);
    auto d_gamma = filled<double>(policy, c.gamma.shape(), 0);
    const auto d_x = rms_norm_vjp(policy, c.d_y, c.x, c.gamma, d_gamma.view());
    const auto loss = [&] { return inner(c.d_y, rms_norm(policy, c.x, c.gamma)); };
    CHECK(relative_error(d_x, finite_differences(policy, c.x, loss, 1e-14)) <= 1e-10);  // linear below the floor

    const auto zeros = filled<float>(policy, c.x.shape(), 0);
    const auto gamma = filled<float>(policy, c.gamma.shape(), 1);
    for (const float y : to_host(policy, rms_norm(policy, zeros, gamma))) CHECK(y == 0);
}

TEST_CASE_TEMPLATE("rms_norm: does not change with the scale of its rows, where squares overflow either", T, float,
                   double) {
    const Cpu policy(1);
    constexpr double epsilon = std::numeric_limits<T>::epsilon();
    for (const auto& shape : shapes) {
        CAPTURE(shape_string(shape));
        const Case<T> c(policy, shape);
        auto d_gamma = filled<T>(policy, c.gamma.shape(), 0);
        const auto y = rms_norm(policy, c.x, c.gamma);
        const auto d_x = rms_norm_vjp(policy, c.d_y, c.x, c.gamma, d_gamma.view());
        for (const double scale : large_scales<T>()) {
            CAPTURE(scale);
            const auto x = times(policy, c.x, scale);
            auto large_d_gamma = filled<T>(policy, c.gamma.shape(), 0);
            CHECK(relative_error(rms_norm(policy, x, c.gamma), y) <= 4 * epsilon);
            const auto large_d_x = rms_norm_vjp(policy, c.d_y, x, c.gamma, large_d_gamma.view());
            if (shape[2] > 1)  // where the entries of a row of one are all the row, its gradient is 0 but for rounding
                CHECK(relative_error(times(policy, large_d_x, scale), d_x) <= 32 * epsilon);
            CHECK(relative_error(large_d_gamma, d_gamma) <= 16 * epsilon);
        }
    }
    const auto largest = filled<T>(policy, std::array<Index, 2>{2, 37}, std::numeric_limits<T>::max());
    const auto ones = filled<T>(policy, std::array<Index, 1>{37}, 1);
    for (const T y : to_host(policy, rms_norm(policy, largest, ones))) CHECK(std::abs(y - 1) <= 4 * epsilon);
}

TEST_CASE("rms_norm: rows that are not finite stay so") {
    const Cpu policy(1);
    const auto ones = filled<float>(policy, std::array<Index, 1>{5}, 1);
    for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
        auto x = filled<float>(policy, std::array<Index, 2>{2, 5}, 1e30);
        x.view()(0, 3) = bad;
        const auto y = rms_norm(policy, x, ones);
        CHECK(std::isnan(y.view()(0, 3)));
        CHECK(y.view()(1, 3) == doctest::Approx(1));
    }
}

TEST_CASE("rms_norm: the same bits with 1 and 2 threads, and for each sequence alone") {
    const Cpu one(1), two(2);
    const Case<float> c(one, {3, 301, 37});
    auto d_gamma = filled<float>(one, c.gamma.shape(), 0), d_gamma2 = copy_of(one, d_gamma);
    const auto y = rms_norm(one, c.x, c.gamma);
    const auto d_x = rms_norm_vjp(one, c.d_y, c.x, c.gamma, d_gamma.view());
    CHECK(same_bits(rms_norm(two, c.x, c.gamma), y));
    CHECK(same_bits(rms_norm_vjp(two, c.d_y, c.x, c.gamma, d_gamma2.view()), d_x));
    CHECK(same_bits(d_gamma2, d_gamma));
    for (Index b = 0; b < 3; ++b) {
        CHECK(same_bits(rms_norm(two, sequence(c.x, b), c.gamma), sequence(y, b)));
        CHECK(same_bits(rms_norm_vjp(two, sequence(c.d_y, b), sequence(c.x, b), c.gamma, d_gamma2.view()),
                        sequence(d_x, b)));
    }
}

TEST_CASE("rms_norm: takes tensors of any rank") {
    const Cpu policy(1);
    const Case<double> c(policy, {2, 3, 5});
    const auto flat = c.x.view().reshape(std::array<Index, 2>{6, 5});
    CHECK(to_host(policy, rms_norm(policy, flat, c.gamma)) == to_host(policy, rms_norm(policy, c.x, c.gamma)));
}

TEST_CASE("rms_norm: errors name the argument and both shapes") {
    const Cpu policy(1);
    Case<float> c(policy, {2, 3, 5});
    auto narrow = filled<float>(policy, std::array<Index, 1>{4}, 1);
    const auto wide = normal<float>(policy, std::array<Index, 3>{2, 3, 6}, 0);
    CHECK_THROWS_WITH_AS(rms_norm(policy, c.x, narrow), "colt5: `gamma` must have shape (5), but has (4)", ShapeError);
    CHECK_THROWS_WITH_AS(rms_norm_vjp(policy, wide, c.x, c.gamma, c.gamma.view()),
                         "colt5: `d_y` must have shape (2, 3, 5), but has (2, 3, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(rms_norm_vjp(policy, c.d_y, c.x, narrow, c.gamma.view()),
                         "colt5: `gamma` must have shape (5), but has (4)", ShapeError);
    CHECK_THROWS_WITH_AS(rms_norm_vjp(policy, c.d_y, c.x, c.gamma, narrow.view()),
                         "colt5: `d_gamma` must have shape (5), but has (4)", ShapeError);
}
