// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <limits>

#include <colt5/cpu/expr.hpp>
#include <colt5/cpu/feed_forward.hpp>
#include <colt5/cpu/linear.hpp>
#include <colt5/op/gelu.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

template <typename T>
struct Case {
    Case(const Cpu& policy, Index batch, Index length, Index dim, Index hidden)
        : x(normal<T>(policy, std::array{batch, length, dim}, 0, 2)),
          gamma(normal<T>(policy, std::array{dim}, 1)),
          hidden_weight(normal<T>(policy, std::array{hidden, dim}, 2)),
          hidden_bias(normal<T>(policy, std::array{hidden}, 3)),
          project_weight(normal<T>(policy, std::array{dim, hidden}, 4)),
          project_bias(normal<T>(policy, std::array{dim}, 5)),
          d_y(normal<T>(policy, x.shape(), 6)),
          add(normal<T>(policy, x.shape(), 7)) {}
    FeedForwardParameters<const T> parameters() const {
        return {{gamma.const_view()},
                hidden_weight.const_view(),
                hidden_bias.const_view(),
                project_weight.const_view(),
                project_bias.const_view()};
    }
    TokensView<const T> added(bool with_add) const { return with_add ? add.const_view() : TokensView<const T>(); }
    std::array<Index, 3> hidden_shape() const { return {x.extent(0), x.extent(1), hidden_weight.extent(0)}; }

    HostTensor<T, 3> x;
    HostTensor<T, 1> gamma;
    HostTensor<T, 2> hidden_weight;
    HostTensor<T, 1> hidden_bias;
    HostTensor<T, 2> project_weight;
    HostTensor<T, 1> project_bias;
    HostTensor<T, 3> d_y, add;
};

/// Gradients of everything, which begin with ones.
template <typename T>
struct Gradients {
    Gradients(const Cpu& policy, const Case<T>& c)
        : gamma(filled<T>(policy, c.gamma.shape(), 1)),
          hidden_weight(filled<T>(policy, c.hidden_weight.shape(), 1)),
          hidden_bias(filled<T>(policy, c.hidden_bias.shape(), 1)),
          project_weight(filled<T>(policy, c.project_weight.shape(), 1)),
          project_bias(filled<T>(policy, c.project_bias.shape(), 1)) {}
    FeedForwardParameters<T> parameters() {
        return {{gamma.view()}, hidden_weight.view(), hidden_bias.view(), project_weight.view(), project_bias.view()};
    }

    HostTensor<T, 3> x;
    HostTensor<T, 1> gamma;
    HostTensor<T, 2> hidden_weight;
    HostTensor<T, 1> hidden_bias;
    HostTensor<T, 2> project_weight;
    HostTensor<T, 1> project_bias;
};

template <typename T>
Gradients<T> fused(const Cpu& policy, const Case<T>& c, TokensView<const T> pre_activation, bool with_add) {
    Gradients<T> d(policy, c);
    d.x = tensor_like(policy, c.x);
    feed_forward_vjp(policy, d.x.view(), c.d_y, c.x, pre_activation, c.parameters(), d.parameters(),
                     GradientEpilogue<T, Cpu>{c.added(with_add)});
    return d;
}

template <typename T>
Gradients<T> step_by_step(const Cpu& policy, const Case<T>& c, const HostTensor<T, 3>& pre_activation, bool with_add) {
    Gradients<T> d(policy, c);
    const auto g = d.parameters();
    auto d_h = linear_vjp(policy, c.d_y, gelu_forward(policy, pre_activation), c.project_weight, g.project_weight,
                          g.project_bias);
    gelu_vjp(policy, d_h, pre_activation);
    const auto d_normed =
        linear_vjp(policy, d_h, rms_norm(policy, c.x, c.gamma), c.hidden_weight, g.hidden_weight, g.hidden_bias);
    d.x = rms_norm_vjp(policy, d_normed, c.x, c.gamma, g.norm.gamma);
    if (with_add) assign(policy, d.x, d.x + c.add);
    return d;
}

template <typename T>
void check_against_steps(const Cpu& policy, const Case<T>& c, double tolerance) {
    const auto expected_pre_activation =
        linear(policy, rms_norm(policy, c.x, c.gamma), c.hidden_weight, c.hidden_bias.const_view());
    auto expected =
        linear(policy, gelu_forward(policy, expected_pre_activation), c.project_weight, c.project_bias.const_view());
    for (const bool with_add : {false, true}) {
        if (with_add) assign(policy, expected, expected + c.add);
        HostTensor<T, 3> pre_activation(policy, c.hidden_shape());
        const auto y = feed_forward(policy, c.x, c.parameters(), pre_activation.view(), c.added(with_add));
        CHECK(relative_error(y, expected) <= tolerance);
        CHECK(relative_error(pre_activation, expected_pre_activation) <= tolerance);
        CHECK(same_bits(feed_forward(policy, c.x, c.parameters(), {}, c.added(with_add)), y));

        const Gradients<T> d = fused(policy, c, pre_activation.const_view(), with_add),
                           e = step_by_step(policy, c, pre_activation, with_add);
        CHECK(relative_error(d.x, e.x) <= tolerance);
        CHECK(relative_error(d.gamma, e.gamma) <= tolerance);
        CHECK(relative_error(d.hidden_weight, e.hidden_weight) <= tolerance);
        CHECK(relative_error(d.hidden_bias, e.hidden_bias) <= tolerance);
        CHECK(relative_error(d.project_weight, e.project_weight) <= tolerance);
        CHECK(relative_error(d.project_bias, e.project_bias) <= tolerance);
        CHECK(same_bits(fused(policy, c, {}, with_add).x, d.x));  // computed again
    }
}

}  // namespace

TEST_CASE("feed_forward: agrees with its steps, both ways") {
    const Cpu policy(2);
    // Around the tiles of a product (6 rows), the panels (24 to 384 rows) and the lanes of backward (128 rows).
    for (const auto& shape : {std::array<Index, 4>{1, 1, 1, 1},
                              {2, 5, 7, 3},
                              {1, 64, 33, 20},
                              {3, 130, 16, 65},
                              {1, 1500, 12, 9},
                              {2, 0, 3, 4}}) {
        CAPTURE(shape_string(shape));
        const auto [batch, length, dim, hidden] = shape;
        check_against_steps(policy, Case<double>(policy, batch, length, dim, hidden), 1e-12);
        check_against_steps(policy, Case<float>(policy, batch, length, dim, hidden), 1e-5);
    }
}

TEST_CASE("feed_forward: the same bits with 1 and 2 threads, and for each sequence alone") {
    const Cpu one(1), two(2);
    const Case<float> c(one, 3, 301, 40, 37);
    HostTensor<float, 3> pre_activation(one, c.hidden_shape());
    const auto y = feed_forward(one, c.x, c.parameters(), pre_activation.view(), c.added(true));
    CHECK(same_bits(feed_forward(two, c.x, c.parameters(), {}, c.added(true)), y));
    const Gradients<float> d = fused(one, c, pre_activation.const_view(), true),
                           d2 = fused(two, c, pre_activation.const_view(), true);
    CHECK(same_bits(d2.x, d.x));
    CHECK(same_bits(d2.gamma, d.gamma));
    CHECK(same_bits(d2.hidden_weight, d.hidden_weight));
    CHECK(same_bits(d2.hidden_bias, d.hidden_bias));
    CHECK(same_bits(d2.project_weight, d.project_weight));
    CHECK(same_bits(d2.project_bias, d.project_bias));
    for (Index b = 0; b < c.x.extent(0); ++b) {
        CHECK(same_bits(feed_forward(two, sequence(c.x, b), c.parameters(), {}, sequence(c.add, b)), sequence(y, b)));
        Gradients<float> g(two, c);
        HostTensor<float, 3> d_x(two, {1, 301, 40});
        feed_forward_vjp(two, d_x.view(), sequence(c.d_y, b), sequence(c.x, b), sequence(pre_activation, b),
                         c.parameters(), g.parameters(), GradientEpilogue<float, Cpu>{sequence(c.add, b)});
        CHECK(same_bits(d_x, sequence(d.x, b)));
    }
}

TEST_CASE("feed_forward: does not change with the scale of its rows, where squares overflow either") {
    const Cpu policy(1);
    Case<float> c(policy, 2, 70, 37, 19);
    const auto y = feed_forward(policy, c.x, c.parameters());
    const Gradients<float> d = fused(policy, c, {}, false);
    for (const double scale : {0x1p66, 0x1p124}) {
        c.x = times(policy, c.x, scale);
        CHECK(relative_error(feed_forward(policy, c.x, c.parameters()), y) <= 1e-6);
        const Gradients<float> large = fused(policy, c, {}, false);
        CHECK(relative_error(times(policy, large.x, scale), d.x) <= 1e-5);
        CHECK(relative_error(large.gamma, d.gamma) <= 1e-5);
        CHECK(relative_error(large.hidden_weight, d.hidden_weight) <= 1e-5);
        c.x = times(policy, c.x, 1 / scale);
    }
}

TEST_CASE("feed_forward: a NaN in a token makes this token NaN, both ways, and no other") {
    const Cpu policy(1);
    Case<float> c(policy, 1, 3, 37, 19);
    c.x.view()(0, 1, 5) = std::numeric_limits<float>::quiet_NaN();
    const auto y = feed_forward(policy, c.x, c.parameters());
    const Gradients<float> d = fused(policy, c, {}, false);
    for (Index i = 0; i < 3; ++i)
        for (Index j = 0; j < 37; ++j) {
            CHECK(std::isnan(y.view()(0, i, j)) == (i == 1));
            CHECK(std::isnan(d.x.view()(0, i, j)) == (i == 1));
        }
}

TEST_CASE("feed_forward: errors name the argument and both shapes") {
    const Cpu policy(1);
    const Case<float> c(policy, 2, 3, 4, 5), wide(policy, 2, 3, 6, 5);
    CHECK_THROWS_WITH_AS(feed_forward(policy, wide.x, c.parameters()), "colt5: `norm` must have shape (6), but has (4)",
                         ShapeError);
    auto parameters = c.parameters();
    parameters.hidden_weight = wide.hidden_weight.const_view();
    CHECK_THROWS_WITH_AS(feed_forward(policy, c.x, parameters),
                         "colt5: `hidden_weight` must have shape (5, 4), but has (5, 6)", ShapeError);
    parameters = c.parameters();
    parameters.hidden_bias = wide.gamma.const_view();
    CHECK_THROWS_WITH_AS(feed_forward(policy, c.x, parameters), "colt5: `hidden_bias` must have shape (5), but has (6)",
                         ShapeError);
    parameters = c.parameters();
    parameters.project_weight = wide.project_weight.const_view();
    CHECK_THROWS_WITH_AS(feed_forward(policy, c.x, parameters),
                         "colt5: `project_weight` must have shape (4, 5), but has (6, 5)", ShapeError);
    parameters = c.parameters();
    parameters.project_bias = wide.gamma.const_view();
    CHECK_THROWS_WITH_AS(feed_forward(policy, c.x, parameters),
                         "colt5: `project_bias` must have shape (4), but has (6)", ShapeError);
    auto pre_activation = tensor_like(policy, c.x);
    CHECK_THROWS_WITH_AS(feed_forward(policy, c.x, c.parameters(), pre_activation.view()),
                         "colt5: `pre_activation` must have shape (2, 3, 5), but has (2, 3, 4)", ShapeError);
    CHECK_THROWS_WITH_AS(feed_forward(policy, c.x, c.parameters(), {}, wide.x.const_view()),
                         "colt5: `add` must have shape (2, 3, 4), but has (2, 3, 6)", ShapeError);
    Gradients<float> d(policy, c);
    auto d_x = tensor_like(policy, c.x);
    const auto vjp = [&](const auto& d_y, TokensView<const float> kept) {
        feed_forward_vjp(policy, d_x.view(), d_y, c.x, kept, c.parameters(), d.parameters());
    };
    CHECK_THROWS_WITH_AS(vjp(wide.d_y, {}), "colt5: `d_y` must have shape (2, 3, 4), but has (2, 3, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(vjp(c.d_y, pre_activation.const_view()),
                         "colt5: `pre_activation` must have shape (2, 3, 5), but has (2, 3, 4)", ShapeError);
}
