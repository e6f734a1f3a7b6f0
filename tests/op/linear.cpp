// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>

#include <colt5/cpu/linear.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

template <typename T>
struct Case {
    Case(const Cpu& policy, Index batch, Index routes, Index length, Index in, Index out)
        : x(normal<T>(policy, std::array{batch, routes, length, in}, 0)),
          weight(normal<T>(policy, std::array{routes * out, in}, 1)),
          bias(normal<T>(policy, std::array{routes * out}, 2)),
          d_y(normal<T>(policy, std::array{batch, routes, length, out}, 3)) {}
    HostTensor<T, 4> x;
    HostTensor<T, 2> weight;
    HostTensor<T, 1> bias;
    HostTensor<T, 4> d_y;
};

HostTensor<double, 4> naive(const Cpu& policy, const Case<double>& c, bool with_bias) {
    auto y = tensor_like(policy, c.d_y);
    const auto [batch, routes, length, out] = y.shape();
    for (Index b = 0; b < batch; ++b)
        for (Index r = 0; r < routes; ++r)
            for (Index i = 0; i < length; ++i)
                for (Index o = 0; o < out; ++o) {
                    double sum = with_bias ? c.bias.view()(r * out + o) : 0;
                    for (Index e = 0; e < c.x.extent(3); ++e)
                        sum += c.x.view()(b, r, i, e) * c.weight.view()(r * out + o, e);
                    y.view()(b, r, i, o) = sum;
                }
    return y;
}

// Sizes around what a task takes (24 to 192 rows), a chunk of the backward pass (1024 rows) and a block of products
// (512 steps along in, 16 to 64 columns).
constexpr std::array<std::array<Index, 5>, 18> shapes{{{1, 1, 1, 1, 1},
                                                       {2, 1, 3, 5, 7},
                                                       {3, 2, 17, 16, 3},
                                                       {1, 3, 63, 9, 65},
                                                       {2, 1, 64, 33, 64},
                                                       {1, 2, 65, 8, 66},
                                                       {1, 1, 257, 12, 130},
                                                       {2, 1, 301, 31, 4},
                                                       {1, 1, 4200, 3, 2},
                                                       {1, 1, 5, 700, 9},
                                                       {1, 1, 3, 2, 1030},
                                                       {1, 1, 24, 600, 70},
                                                       {1, 1, 25, 600, 70},
                                                       {8, 1, 3, 600, 70},
                                                       {8, 2, 3, 600, 70},
                                                       {0, 1, 3, 4, 5},
                                                       {2, 1, 0, 4, 5},
                                                       {2, 1, 3, 4, 0}}};

}  // namespace

TEST_CASE("linear: agrees with a loop, with and without bias, in double and float") {
    const Cpu policy(2);
    for (const auto& shape : shapes) {
        CAPTURE(shape_string(shape));
        const auto [batch, routes, length, in, out] = shape;
        const Case<double> c(policy, batch, routes, length, in, out);
        const Case<float> f(policy, batch, routes, length, in, out);
        for (const bool with_bias : {false, true}) {
            const auto expected = naive(policy, c, with_bias);
            const auto bias = with_bias ? c.bias.const_view() : VectorView<const double>();
            CHECK(relative_error(routed_linear(policy, c.x, c.weight, bias), expected) <= 1e-13);
            const auto bias_f = with_bias ? f.bias.const_view() : VectorView<const float>();
            CHECK(relative_error(routed_linear(policy, f.x, f.weight, bias_f), expected) <= 2e-6);
        }
    }
}

TEST_CASE("linear: an inner dimension of 0 gives the bias and what is added, or zeros") {
    const Cpu policy(2);
    for (const Index length : {3, 700}) {
        const Case<double> c(policy, 2, 1, length, 0, 5);
        CHECK(same_bits(routed_linear(policy, c.x, c.weight, c.bias.const_view()), naive(policy, c, true)));
        CHECK(same_bits(routed_linear(policy, c.x, c.weight), naive(policy, c, false)));
        const auto x = c.x.view().reshape(std::array<Index, 3>{2, length, 0});
        const auto add = c.d_y.view().reshape(std::array<Index, 3>{2, length, 5});
        CHECK(to_host(policy, linear(policy, x, c.weight, {}, add.const_view())) == to_host(policy, c.d_y));

        const Case<double> none(policy, 2, 3, length, 4, 0);  // without outputs, x has gradient 0
        auto d_weight = filled<double>(policy, none.weight.shape(), 0);
        const auto d_x = routed_linear_vjp(policy, none.d_y, none.x, none.weight, d_weight.view());
        for (const double value : to_host(policy, d_x)) CHECK(value == 0);
    }
}

TEST_CASE("linear: one route is torch's Linear") {
    const Cpu policy(2);
    const Case<double> c(policy, 2, 1, 37, 6, 10);
    const auto x = c.x.view().reshape(std::array<Index, 3>{2, 37, 6});
    const auto d_y = c.d_y.view().reshape(std::array<Index, 3>{2, 37, 10});
    CHECK(to_host(policy, linear(policy, x, c.weight, c.bias.const_view())) ==
          to_host(policy, routed_linear(policy, c.x, c.weight, c.bias.const_view())));

    auto d_weight = filled<double>(policy, c.weight.shape(), 0), routed_d_weight = copy_of(policy, d_weight);
    auto d_bias = filled<double>(policy, c.bias.shape(), 0), routed_d_bias = copy_of(policy, d_bias);
    const auto d_x = linear_vjp(policy, d_y, x, c.weight, d_weight.view(), d_bias.view());
    const auto routed_d_x =
        routed_linear_vjp(policy, c.d_y, c.x, c.weight, routed_d_weight.view(), routed_d_bias.view());
    CHECK(to_host(policy, d_x) == to_host(policy, routed_d_x));
    CHECK(same_bits(d_weight, routed_d_weight));
    CHECK(same_bits(d_bias, routed_d_bias));
}

TEST_CASE("linear: adds a matrix, with and without a bias, and writes where it is told") {
    const Cpu policy(2);
    for (const auto& [length, in, out] : {std::array<Index, 3>{37, 6, 10}, {301, 600, 70}}) {
        const auto x = normal<double>(policy, std::array<Index, 3>{2, length, in}, 0);
        HostTensor<double, 3> add;
        const auto weight = normal<double>(policy, std::array<Index, 2>{out, in}, 2);
        const auto bias = normal<double>(policy, std::array<Index, 1>{out}, 3);
        for (const auto& added_bias : {VectorView<const double>(), bias.const_view()}) {
            add = normal<double>(policy, std::array<Index, 3>{2, length, out}, 1);
            auto expected = linear(policy, x, weight, added_bias);
            for (Index i = 0; i < expected.size(); ++i) expected.data()[i] += add.data()[i];
            auto y = copy_of(policy, add);
            linear(policy, y.view(), x, weight, added_bias, add.const_view());
            CHECK(relative_error(y, expected) <= 1e-13);
            linear(policy, add.view(), x, weight, added_bias, add.const_view());  // onto what is added
            CHECK(same_bits(add, y));
        }
    }
}

TEST_CASE("linear: routes write where they are told, and a gradient where an x was that is not needed any more") {
    const Cpu policy(2);
    for (const auto& shape : shapes) {
        CAPTURE(shape_string(shape));
        const auto [batch, routes, length, in, out] = shape;
        const Case<double> c(policy, batch, routes, length, in, out);
        auto y = copy_of(policy, c.d_y);
        routed_linear(policy, y.view(), c.x, c.weight, c.bias.const_view());
        CHECK(same_bits(y, routed_linear(policy, c.x, c.weight, c.bias.const_view())));

        auto d_weight = filled<double>(policy, c.weight.shape(), 0), again = copy_of(policy, d_weight);
        const auto d_x = routed_linear_vjp(policy, c.d_y, c.x, c.weight, d_weight.view());
        auto x = copy_of(policy, c.x);
        const double* const memory = x.data();
        const auto in_place = routed_linear_vjp(policy, c.d_y, std::move(x), c.weight, again.view());
        CHECK(in_place.data() == memory);
        CHECK(same_bits(in_place, d_x));
        CHECK(same_bits(again, d_weight));
    }
    const Case<double> c(policy, 2, 3, 4, 5, 6);
    auto y = copy_of(policy, c.x);
    CHECK_THROWS_WITH_AS(routed_linear(policy, y.view(), c.x, c.weight),
                         "colt5: `y` must have shape (2, 3, 4, 6), but has (2, 3, 4, 5)", ShapeError);
}

TEST_CASE("linear: the gradients are those of finite differences; those of parameters accumulate") {
    const Cpu policy(1);
    for (const auto& shape : shapes) {
        CAPTURE(shape_string(shape));
        const auto [batch, routes, length, in, out] = shape;
        Case<double> c(policy, batch, routes, length, in, out);
        auto d_weight = filled<double>(policy, c.weight.shape(), 0);
        auto d_bias = filled<double>(policy, c.bias.shape(), 0);
        const auto d_x = routed_linear_vjp(policy, c.d_y, c.x, c.weight, d_weight.view(), d_bias.view());
        const auto loss = [&] { return inner(c.d_y, routed_linear(policy, c.x, c.weight, c.bias.const_view())); };
        if (c.x.size() + c.weight.size() < 200) {
            CHECK(relative_error(d_x, finite_differences(policy, c.x, loss)) <= 1e-8);
            CHECK(relative_error(d_weight, finite_differences(policy, c.weight, loss)) <= 1e-8);
            CHECK(relative_error(d_bias, finite_differences(policy, c.bias, loss)) <= 1e-8);
        } else {
            CHECK(directional_error(policy, c.x, d_x, loss, 1e-4) <= 1e-8);
            CHECK(directional_error(policy, c.weight, d_weight, loss, 1e-4) <= 1e-8);
            CHECK(directional_error(policy, c.bias, d_bias, loss, 1e-4) <= 1e-8);
        }

        auto more_weight = filled<double>(policy, c.weight.shape(), 3);
        auto more_bias = copy_of(policy, d_bias);
        routed_linear_vjp(policy, c.d_y, c.x, c.weight, more_weight.view(), more_bias.view());
        for (Index i = 0; i < d_weight.size(); ++i) d_weight.data()[i] += 3;
        for (Index i = 0; i < d_bias.size(); ++i) d_bias.data()[i] *= 2;
        CHECK(relative_error(more_weight, d_weight) <= 1e-13);
        CHECK(relative_error(more_bias, d_bias) <= 1e-13);

        const Case<float> f(policy, batch, routes, length, in, out);
        auto d_weight_f = filled<float>(policy, c.weight.shape(), 3);
        const auto d_x_f = routed_linear_vjp(policy, f.d_y, f.x, f.weight, d_weight_f.view());  // without a bias
        CHECK(relative_error(d_x_f, d_x) <= 2e-6);
        CHECK(relative_error(d_weight_f, d_weight) <= 4e-6);
    }
}

TEST_CASE("linear: the same bits with 1 and 2 threads, and for each sequence alone") {
    const Cpu one(1), two(2);
    for (const auto& [batch, routes, length, in, out] :
         {std::array<Index, 5>{3, 2, 301, 40, 37}, {2, 1, 70, 513, 64}, {16, 1, 20, 600, 70}, {3, 2, 20, 600, 70}}) {
        const Case<float> c(one, batch, routes, length, in, out);
        auto d_weight = filled<float>(one, c.weight.shape(), 0), d_weight2 = copy_of(one, d_weight);
        auto d_bias = filled<float>(one, c.bias.shape(), 0), d_bias2 = copy_of(one, d_bias);
        const auto y = routed_linear(one, c.x, c.weight, c.bias.const_view());
        const auto d_x = routed_linear_vjp(one, c.d_y, c.x, c.weight, d_weight.view(), d_bias.view());
        CHECK(same_bits(routed_linear(two, c.x, c.weight, c.bias.const_view()), y));
        CHECK(same_bits(routed_linear_vjp(two, c.d_y, c.x, c.weight, d_weight2.view(), d_bias2.view()), d_x));
        CHECK(same_bits(d_weight2, d_weight));
        CHECK(same_bits(d_bias2, d_bias));
        for (Index b = 0; b < batch; ++b) {
            CHECK(same_bits(routed_linear(two, sequence(c.x, b), c.weight, c.bias.const_view()), sequence(y, b)));
            CHECK(same_bits(routed_linear_vjp(two, sequence(c.d_y, b), sequence(c.x, b), c.weight, d_weight2.view(),
                                              d_bias2.view()),
                            sequence(d_x, b)));
        }
    }
}

TEST_CASE("linear: errors name the argument and both shapes") {
    const Cpu policy(1);
    const Case<float> c(policy, 2, 2, 3, 4, 5);
    const auto tokens = normal<float>(policy, std::array<Index, 3>{2, 3, 4}, 0);
    const auto wide = normal<float>(policy, std::array<Index, 2>{5, 6}, 0);
    const auto odd = normal<float>(policy, std::array<Index, 2>{5, 4}, 0);
    const auto d_tokens = normal<float>(policy, std::array<Index, 3>{2, 3, 5}, 0);
    auto d_weight = filled<float>(policy, c.weight.shape(), 0), d_odd = filled<float>(policy, odd.shape(), 0);
    auto d_bias = filled<float>(policy, std::array<Index, 1>{7}, 0);
    CHECK_THROWS_WITH_AS(linear(policy, tokens, wide), "colt5: `weight` must have shape (any, 4), but has (5, 6)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(linear(policy, tokens, odd, d_bias.const_view()),
                         "colt5: `bias` must have shape (5), but has (7)", ShapeError);
    CHECK_THROWS_WITH_AS(linear_vjp(policy, tokens, tokens, odd, d_odd.view()),
                         "colt5: `d_y` must have shape (2, 3, 5), but has (2, 3, 4)", ShapeError);
    CHECK_THROWS_WITH_AS(linear_vjp(policy, d_tokens, tokens, wide, d_odd.view()),
                         "colt5: `weight` must have shape (any, 4), but has (5, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(linear_vjp(policy, d_tokens, tokens, odd, d_weight.view()),
                         "colt5: `d_weight` must have shape (5, 4), but has (10, 4)", ShapeError);
    CHECK_THROWS_WITH_AS(linear_vjp(policy, d_tokens, tokens, odd, d_odd.view(), d_bias.view()),
                         "colt5: `d_bias` must have shape (5), but has (7)", ShapeError);

    CHECK_THROWS_WITH_AS(routed_linear(policy, c.x, wide), "colt5: `weight` must have shape (any, 4), but has (5, 6)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(routed_linear(policy, c.x, odd),
                         "colt5: `weight` must be divisible by the number of routes in its rows, but is 5", ValueError);
    CHECK_THROWS_WITH_AS(routed_linear(policy, c.x, c.weight, d_bias.const_view()),
                         "colt5: `bias` must have shape (10), but has (7)", ShapeError);
    CHECK_THROWS_WITH_AS(routed_linear_vjp(policy, c.x, c.x, c.weight, d_weight.view()),
                         "colt5: `d_y` must have shape (2, 2, 3, 5), but has (2, 2, 3, 4)", ShapeError);
    CHECK_THROWS_WITH_AS(routed_linear_vjp(policy, c.d_y, c.x, wide, d_weight.view()),
                         "colt5: `weight` must have shape (any, 4), but has (5, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(routed_linear_vjp(policy, c.d_y, c.x, c.weight, d_odd.view()),
                         "colt5: `d_weight` must have shape (10, 4), but has (5, 4)", ShapeError);
    CHECK_THROWS_WITH_AS(routed_linear_vjp(policy, c.d_y, c.x, c.weight, d_weight.view(), d_bias.view()),
                         "colt5: `d_bias` must have shape (10), but has (7)", ShapeError);
    const Case<float> none(policy, 2, 0, 3, 4, 5);
    CHECK_THROWS_AS(routed_linear_vjp(policy, none.d_y, none.x, none.weight, MatrixView<float>(nullptr, {0, 4})),
                    ValueError);
}
