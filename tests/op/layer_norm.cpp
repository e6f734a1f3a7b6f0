// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <cmath>

#include <colt5/cpu/layer_norm.hpp>

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
        : x(normal<T>(policy, shape, 0, 3)),
          weight(normal<T>(policy, std::array{shape[2]}, 1)),
          bias(normal<T>(policy, std::array{shape[2]}, 2)),
          d_y(normal<T>(policy, shape, 3)) {
        for (Index i = 0; i < x.size(); ++i) x.data()[i] += T(2);
    }
    HostTensor<T, 3> x;
    HostTensor<T, 1> weight, bias;
    HostTensor<T, 3> d_y;
};

auto naive(const Cpu& policy, const Case<double>& c) {
    auto y = tensor_like(policy, c.x);
    const auto x = c.x.view().rows();
    const auto d = static_cast<double>(x.extent(1));
    for (Index i = 0; i < x.extent(0); ++i) {
        double mean = 0, variance = 0;
        for (Index j = 0; j < x.extent(1); ++j) mean += x(i, j) / d;
        for (Index j = 0; j < x.extent(1); ++j) variance += (x(i, j) - mean) * (x(i, j) - mean) / d;
        for (Index j = 0; j < x.extent(1); ++j)
            y.view().rows()(i, j) =
                (x(i, j) - mean) / std::sqrt(variance + 1e-5) * c.weight.view()(j) + c.bias.view()(j);
    }
    return y;
}

}  // namespace

TEST_CASE("layer_norm: agrees with a loop in double and float") {
    const Cpu policy(2);
    for (const auto& shape : shapes) {
        CAPTURE(shape_string(shape));
        const Case<double> c(policy, shape);
        const Case<float> f(policy, shape);
        const auto expected = naive(policy, c);
        CHECK(relative_error(layer_norm(policy, c.x, c.weight, c.bias), expected) <= 1e-13);
        CHECK(relative_error(layer_norm(policy, f.x, f.weight, f.bias), expected) <= 2e-6);
    }
}

TEST_CASE("layer_norm: a large mean does not cancel the deviation") {
    const Cpu policy(1);
    Case<float> f(policy, {1, 4, 33});
    Case<double> c(policy, {1, 4, 33});
    for (Index i = 0; i < c.x.size(); ++i) {
        f.x.data()[i] += 4096;
        c.x.data()[i] = static_cast<double>(f.x.data()[i]);
    }
    CHECK(relative_error(layer_norm(policy, f.x, f.weight, f.bias), naive(policy, c)) <= 2e-4);
}

TEST_CASE("layer_norm: the gradients are those of finite differences; those of parameters accumulate") {
    const Cpu policy(1);
    for (const auto& shape : shapes) {
        CAPTURE(shape_string(shape));
        Case<double> c(policy, shape);
        auto d_weight = filled<double>(policy, c.weight.shape(), 0), d_bias = copy_of(policy, d_weight);
        const auto d_x = layer_norm_vjp(policy, c.d_y, c.x, c.weight, d_weight.view(), d_bias.view());
        auto more_weight = filled<double>(policy, c.weight.shape(), 3), more_bias = copy_of(policy, d_bias);
        layer_norm_vjp(policy, c.d_y, c.x, c.weight, more_weight.view(), more_bias.view());
        for (Index j = 0; j < shape[2]; ++j) {
            CHECK(more_weight.view()(j) == doctest::Approx(3 + d_weight.view()(j)).epsilon(1e-12));
            CHECK(more_bias.view()(j) == doctest::Approx(2 * d_bias.view()(j)).epsilon(1e-12));
        }
        const auto loss = [&] { return inner(c.d_y, layer_norm(policy, c.x, c.weight, c.bias)); };
        if (shape[2] == 1) {  // y = bias
            for (const double d : to_host(policy, d_x)) CHECK(std::abs(d) <= 1e-10);
            for (const double d : to_host(policy, d_weight)) CHECK(d == 0);
        } else {
            if (c.x.size() < 200)
                CHECK(relative_error(d_x, finite_differences(policy, c.x, loss)) <= 1e-7);
            else
                CHECK(directional_error(policy, c.x, d_x, loss) <= 1e-7);
            CHECK(relative_error(d_weight, finite_differences(policy, c.weight, loss)) <= 1e-7);
        }
        CHECK(relative_error(d_bias, finite_differences(policy, c.bias, loss)) <= 1e-7);

        const Case<float> f(policy, shape);
        auto d_weight_f = filled<float>(policy, c.weight.shape(), 0), d_bias_f = copy_of(policy, d_weight_f);
        const auto d_x_f = layer_norm_vjp(policy, f.d_y, f.x, f.weight, d_weight_f.view(), d_bias_f.view());
        if (shape[2] > 1) {
            CHECK(relative_error(d_x_f, d_x) <= 4e-6);
            CHECK(relative_error(d_weight_f, d_weight) <= 4e-6);
        }
        CHECK(relative_error(d_bias_f, d_bias) <= 4e-6);
    }
}

TEST_CASE("layer_norm: a constant row gives the bias, however its mean is rounded") {
    const Cpu policy(1);
    for (const Index d : {3, 13, 16, 100, 515, 1000}) {
        const Case<float> c(policy, {1, 2, d});
        for (const float value : {0.375f, 1000.1f, 1e4f + 0.3f, -1e8f}) {
            CAPTURE(value);
            const auto constant = filled<float>(policy, c.x.shape(), static_cast<double>(value));
            const auto y = layer_norm(policy, constant, c.weight, c.bias);
            for (Index i = 0; i < 2; ++i)
                for (Index j = 0; j < d; ++j) CHECK(y.view()(0, i, j) == c.bias.view()(j));
        }
    }
}

TEST_CASE("layer_norm: the gradient of a large constant row is finite where it does not fill a batch") {
    const Cpu policy(1);
    const auto x = filled<float>(policy, std::array<Index, 3>{1, 1, 3}, 0x1p120);
    auto d_y = filled<float>(policy, x.shape(), 0);
    const auto weight = filled<float>(policy, std::array<Index, 1>{3}, 1);
    auto d_weight = filled<float>(policy, weight.shape(), 0), d_bias = copy_of(policy, d_weight);
    d_y.data()[0] = 1;
    const auto d_x = layer_norm_vjp(policy, d_y, x, weight, d_weight.view(), d_bias.view());
    for (Index j = 0; j < 3; ++j)
        CHECK(d_x.data()[j] == doctest::Approx(std::sqrt(1e5) * (j == 0 ? 2 : -1) / 3).epsilon(1e-5));
}

TEST_CASE_TEMPLATE("layer_norm: does not change with the scale of its rows, where sums or squares overflow either", T,
                   float, double) {
    const Cpu policy(1);
    constexpr double epsilon = std::numeric_limits<T>::epsilon();
    for (const auto& shape : shapes) {
        if (shape[2] == 1) continue;  // y = bias
        CAPTURE(shape_string(shape));
        Case<T> c(policy, shape);
        const auto unscaled = times(policy, c.x, 0x1p30);  // ε is nothing beside these
        auto d_weight = filled<T>(policy, c.weight.shape(), 0), d_bias = copy_of(policy, d_weight);
        const auto y = layer_norm(policy, unscaled, c.weight, c.bias);
        const auto d_x =
            times(policy, layer_norm_vjp(policy, c.d_y, unscaled, c.weight, d_weight.view(), d_bias.view()), 0x1p30);
        for (const double scale : large_scales<T>()) {
            CAPTURE(scale);
            const auto x = times(policy, c.x, scale);
            auto large_d_weight = filled<T>(policy, c.weight.shape(), 0),
                 large_d_bias = copy_of(policy, large_d_weight);
            CHECK(relative_error(layer_norm(policy, x, c.weight, c.bias), y) <= 16 * epsilon);
            const auto large_d_x =
                layer_norm_vjp(policy, c.d_y, x, c.weight, large_d_weight.view(), large_d_bias.view());
            if (shape[2] > 2)  // in rows of two, z is ±1 whatever x is
                CHECK(relative_error(times(policy, large_d_x, scale), d_x) <= 64 * epsilon);
            CHECK(relative_error(large_d_weight, d_weight) <= 64 * epsilon);
            CHECK(same_bits(large_d_bias, d_bias));
        }
    }
    const T largest = std::numeric_limits<T>::max();
    const auto ones = filled<T>(policy, std::array<Index, 1>{36}, 1), zeros = filled<T>(policy, ones.shape(), 0);
    auto x = filled<T>(policy, std::array<Index, 1>{36}, -static_cast<double>(largest));
    for (Index j = 0; j < 18; ++j) x.data()[2 * j] = largest;
    const auto y = layer_norm(policy, x, ones, zeros);
    for (Index j = 0; j < 36; ++j) CHECK(std::abs(y.data()[j] - T(j % 2 == 0 ? 1 : -1)) <= 4 * epsilon);
    for (const double scale : {0.3, 0.7, 1.0}) {  // constant rows, whose mean is rounded
        fill(policy, x, scale * static_cast<double>(largest));
        for (const T value : to_host(policy, layer_norm(policy, x, ones, zeros))) CHECK(value == 0);
    }
}

TEST_CASE("layer_norm: the same bits with 1 and 2 threads, and for each sequence alone") {
    const Cpu one(1), two(2);
    const Case<float> c(one, {3, 301, 37});
    auto d_weight = filled<float>(one, c.weight.shape(), 0), d_bias = copy_of(one, d_weight);
    auto d_weight2 = copy_of(one, d_weight), d_bias2 = copy_of(one, d_weight);
    const auto y = layer_norm(one, c.x, c.weight, c.bias);
    const auto d_x = layer_norm_vjp(one, c.d_y, c.x, c.weight, d_weight.view(), d_bias.view());
    CHECK(same_bits(layer_norm(two, c.x, c.weight, c.bias), y));
    CHECK(same_bits(layer_norm_vjp(two, c.d_y, c.x, c.weight, d_weight2.view(), d_bias2.view()), d_x));
    CHECK(same_bits(d_weight2, d_weight));
    CHECK(same_bits(d_bias2, d_bias));
    for (Index b = 0; b < 3; ++b) {
        const auto x = sequence(c.x, b), d_y = sequence(c.d_y, b);
        CHECK(same_bits(layer_norm(two, x, c.weight, c.bias), sequence(y, b)));
        CHECK(same_bits(layer_norm_vjp(two, d_y, x, c.weight, d_weight2.view(), d_bias2.view()), sequence(d_x, b)));
    }
}

TEST_CASE("layer_norm: errors name the argument and both shapes") {
    const Cpu policy(1);
    Case<float> c(policy, {2, 3, 5});
    auto narrow = filled<float>(policy, std::array<Index, 1>{4}, 1);
    const auto wide = normal<float>(policy, std::array<Index, 3>{2, 3, 6}, 0);
    CHECK_THROWS_WITH_AS(layer_norm(policy, c.x, narrow, c.bias), "colt5: `weight` must have shape (5), but has (4)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(layer_norm(policy, c.x, c.weight, narrow), "colt5: `bias` must have shape (5), but has (4)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(layer_norm_vjp(policy, wide, c.x, c.weight, c.weight.view(), c.bias.view()),
                         "colt5: `d_y` must have shape (2, 3, 5), but has (2, 3, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(layer_norm_vjp(policy, c.d_y, c.x, narrow, c.weight.view(), c.bias.view()),
                         "colt5: `weight` must have shape (5), but has (4)", ShapeError);
    CHECK_THROWS_WITH_AS(layer_norm_vjp(policy, c.d_y, c.x, c.weight, narrow.view(), c.bias.view()),
                         "colt5: `d_weight` must have shape (5), but has (4)", ShapeError);
    CHECK_THROWS_WITH_AS(layer_norm_vjp(policy, c.d_y, c.x, c.weight, c.weight.view(), narrow.view()),
                         "colt5: `d_bias` must have shape (5), but has (4)", ShapeError);
}
