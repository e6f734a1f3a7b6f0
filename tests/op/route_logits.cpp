// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include <colt5/cpu/expr.hpp>
#include <colt5/cpu/route_logits.hpp>
#include <colt5/cpu/zero.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

// batch, routes, length, dim: rows around the chunks of 128 (which cross sequences), widths around the lanes of a
// batch.
constexpr std::array<std::array<Index, 4>, 9> shapes{{{1, 1, 1, 1},
                                                      {2, 1, 3, 5},
                                                      {2, 3, 7, 8},
                                                      {1, 2, 128, 16},
                                                      {3, 2, 129, 17},
                                                      {1, 4, 5, 515},
                                                      {2, 2, 0, 3},
                                                      {2, 0, 3, 4},
                                                      {0, 1, 3, 4}}};
constexpr double scale = 0.7;

template <typename T>
struct Case {
    Case(const Cpu& policy, const std::array<Index, 4>& shape)
        : x(normal<T>(policy, std::array{shape[0], shape[2], shape[3]}, 0)),
          token(normal<T>(policy, std::array{shape[1], shape[3]}, 1)),
          d_logits(normal<T>(policy, std::array{shape[0], shape[1], shape[2]}, 2)) {}
    HostTensor<T, 3> x;
    HostTensor<T, 2> token;
    HostTensor<T, 3> d_logits;
};

auto naive(const Cpu& policy, const Case<double>& c) {
    auto logits = tensor_like(policy, c.d_logits);
    for (Index b = 0; b < logits.extent(0); ++b)
        for (Index r = 0; r < logits.extent(1); ++r)
            for (Index i = 0; i < logits.extent(2); ++i) {
                double sum = 0;
                for (Index j = 0; j < c.x.extent(2); ++j) sum += c.x.view()(b, i, j) * c.token.view()(r, j);
                logits.view()(b, r, i) = scale * sum;
            }
    return logits;
}

}  // namespace

TEST_CASE("route_logits: agrees with a loop in double and float") {
    const Cpu policy(2);
    for (const auto& shape : shapes) {
        CAPTURE(shape_string(shape));
        const Case<double> c(policy, shape);
        const Case<float> f(policy, shape);
        const auto expected = naive(policy, c);
        CHECK(relative_error(route_logits(policy, c.x, c.token, scale), expected) <= 1e-14);
        CHECK(relative_error(route_logits(policy, f.x, f.token, scale), expected) <= 1e-6);
    }
}

TEST_CASE("route_logits: the gradients are those of finite differences, and all accumulate") {
    const Cpu policy(1);
    for (const auto& shape : shapes) {
        CAPTURE(shape_string(shape));
        Case<double> c(policy, shape);
        auto d_x = filled<double>(policy, c.x.shape(), 0);
        auto d_token = filled<double>(policy, c.token.shape(), 0);
        if (c.d_logits.size() > 1) c.d_logits.data()[1] = 0;  // straight-through leaves most logits without a gradient
        route_logits_vjp(policy, d_x.view(), d_token.view(), c.d_logits, c.x, c.token, scale);
        const auto loss = [&] { return inner(c.d_logits, route_logits(policy, c.x, c.token, scale)); };
        if (c.x.size() < 200) {
            CHECK(relative_error(d_x, finite_differences(policy, c.x, loss)) <= 1e-9);
            CHECK(relative_error(d_token, finite_differences(policy, c.token, loss)) <= 1e-9);
        } else {
            CHECK(directional_error(policy, c.x, d_x, loss, 1e-4) <= 1e-9);
            CHECK(directional_error(policy, c.token, d_token, loss, 1e-4) <= 1e-9);
        }
        auto more_x = filled<double>(policy, c.x.shape(), 3);
        auto more_token = filled<double>(policy, c.token.shape(), 4);
        route_logits_vjp(policy, more_x.view(), more_token.view(), c.d_logits, c.x, c.token, scale);
        for (Index i = 0; i < d_x.size(); ++i) d_x.data()[i] += 3;
        for (Index i = 0; i < d_token.size(); ++i) d_token.data()[i] += 4;
        CHECK(relative_error(more_x, d_x) <= 1e-14);
        CHECK(relative_error(more_token, d_token) <= 1e-14);

        Case<float> f(policy, shape);
        if (f.d_logits.size() > 1) f.d_logits.data()[1] = 0;
        auto d_x_f = filled<float>(policy, c.x.shape(), 3);
        auto d_token_f = filled<float>(policy, c.token.shape(), 4);
        route_logits_vjp(policy, d_x_f.view(), d_token_f.view(), f.d_logits, f.x, f.token, scale);
        CHECK(relative_error(d_x_f, d_x) <= 1e-6);
        CHECK(relative_error(d_token_f, d_token) <= 4e-6);
    }
}

TEST_CASE("route_logits: the same bits with 1 and 2 threads, and for each sequence alone") {
    const Cpu one(1), two(2);
    const Case<float> c(one, {3, 2, 301, 37});
    auto d_x = filled<float>(one, c.x.shape(), 0), d_x2 = filled<float>(one, c.x.shape(), 0);
    auto d_token = filled<float>(one, c.token.shape(), 0), d_token2 = filled<float>(one, c.token.shape(), 0);
    const auto logits = route_logits(one, c.x, c.token);
    route_logits_vjp(one, d_x.view(), d_token.view(), c.d_logits, c.x, c.token);
    CHECK(same_bits(route_logits(two, c.x, c.token), logits));
    route_logits_vjp(two, d_x2.view(), d_token2.view(), c.d_logits, c.x, c.token);
    CHECK(same_bits(d_x2, d_x));
    CHECK(same_bits(d_token2, d_token));
    for (Index b = 0; b < 3; ++b) {
        CHECK(same_bits(route_logits(two, sequence(c.x, b), c.token), sequence(logits, b)));
        auto alone = filled<float>(one, std::array<Index, 3>{1, 301, 37}, 0);
        route_logits_vjp(two, alone.view(), d_token2.view(), sequence(c.d_logits, b), sequence(c.x, b), c.token);
        CHECK(same_bits(alone, sequence(d_x, b)));
    }
}

TEST_CASE("cosine_logits: agrees with a loop in double and float") {
    const Cpu policy(2);
    for (const auto& shape : shapes) {
        CAPTURE(shape_string(shape));
        const Case<double> c(policy, shape);
        const Case<float> f(policy, shape);
        auto expected = naive(policy, c);
        const auto length_of = [&](const double* row) {
            double square = 0;
            for (Index j = 0; j < shape[3]; ++j) square += row[j] * row[j];
            return std::sqrt(square);
        };
        for (Index b = 0; b < shape[0]; ++b)
            for (Index r = 0; r < shape[1]; ++r)
                for (Index i = 0; i < shape[2]; ++i)
                    expected.view()(b, r, i) /=
                        length_of(c.x.const_view()[b][i].data()) * length_of(c.token.const_view()[r].data());
        CHECK(relative_error(cosine_logits(policy, c.x, c.token, scale).logits, expected) <= 1e-14);
        CHECK(relative_error(cosine_logits(policy, f.x, f.token, scale).logits, expected) <= 1e-6);
    }
}

TEST_CASE("cosine_logits: the gradients go through both norms: those of finite differences, and all accumulate") {
    const Cpu policy(1);
    for (const auto& shape : shapes) {
        CAPTURE(shape_string(shape));
        Case<double> c(policy, shape);
        auto d_x = filled<double>(policy, c.x.shape(), 0);
        auto d_token = filled<double>(policy, c.token.shape(), 0);
        if (c.d_logits.size() > 1) c.d_logits.data()[1] = 0;
        const auto saved = cosine_logits(policy, c.x, c.token, scale);
        cosine_logits_vjp(policy, d_x.view(), d_token.view(), c.d_logits, saved.logits, saved.norms, c.x, c.token,
                          scale);
        const auto loss = [&] { return inner(c.d_logits, cosine_logits(policy, c.x, c.token, scale).logits); };
        if (shape[3] == 1) {  // a direction of one column is its sign
            CHECK(std::sqrt(inner(d_x, d_x)) <= 1e-12);
            CHECK(std::sqrt(inner(d_token, d_token)) <= 1e-12);
        } else if (c.x.size() < 200) {
            CHECK(relative_error(d_x, finite_differences(policy, c.x, loss)) <= 1e-7);
            CHECK(relative_error(d_token, finite_differences(policy, c.token, loss)) <= 1e-7);
        } else {
            CHECK(directional_error(policy, c.x, d_x, loss, 1e-4) <= 1e-7);
            CHECK(directional_error(policy, c.token, d_token, loss, 1e-4) <= 1e-7);
        }
        auto more_x = filled<double>(policy, c.x.shape(), 3);
        auto more_token = filled<double>(policy, c.token.shape(), 4);
        cosine_logits_vjp(policy, more_x.view(), more_token.view(), c.d_logits, saved.logits, saved.norms, c.x, c.token,
                          scale);
        for (Index i = 0; i < d_x.size(); ++i) more_x.data()[i] -= 3;
        for (Index i = 0; i < d_token.size(); ++i) more_token.data()[i] -= 4;
        for (Index i = 0; i < d_x.size(); ++i) CHECK(std::abs(more_x.data()[i] - d_x.data()[i]) <= 1e-13);
        for (Index i = 0; i < d_token.size(); ++i) CHECK(std::abs(more_token.data()[i] - d_token.data()[i]) <= 1e-13);
    }
}

TEST_CASE_TEMPLATE("cosine_logits: tokens of any size, and zeros", T, float, double) {
    const Cpu policy(1);
    constexpr T large = std::is_same_v<T, float> ? T(1e30) : T(1e300);
    HostTensor<T, 3> x(policy, {1, 4, 2});
    HostTensor<T, 2> token(policy, {1, 2});
    token.view()(0, 0) = T(3);
    token.view()(0, 1) = T(4);
    fill(policy, x, 0);
    x.view()(0, 0, 0) = large;
    x.view()(0, 1, 0) = T(1e-10);
    x.view()(0, 2, 1) = std::numeric_limits<T>::quiet_NaN();
    const auto saved = cosine_logits(policy, x, token, 1);
    CHECK(saved.logits.const_view()(0, 0, 0) == doctest::Approx(0.6));
    CHECK(saved.logits.const_view()(0, 0, 1) == doctest::Approx(0.6));
    CHECK(std::isnan(saved.logits.const_view()(0, 0, 2)));
    CHECK(saved.logits.const_view()(0, 0, 3) == 0);
    // A NaN without a gradient, of padding that nobody wrote, reaches nothing.
    HostTensor<T, 3> d_logits(policy, {1, 1, 4});
    fill(policy, d_logits, 1);
    d_logits.view()(0, 0, 2) = 0;
    auto d_x = filled<T>(policy, x.shape(), 0);
    auto d_token = filled<T>(policy, token.shape(), 0);
    cosine_logits_vjp(policy, d_x.view(), d_token.view(), d_logits, saved.logits, saved.norms, x, token, 1);
    for (Index i = 0; i < d_x.size(); ++i) CHECK(std::isfinite(d_x.data()[i]));
    for (Index i = 0; i < 2; ++i) CHECK(std::isfinite(d_token.data()[i]));
    CHECK(d_x.const_view()(0, 2, 1) == 0);
    CHECK(d_x.const_view()(0, 3, 0) == doctest::Approx(0.6e12));  // 1 / 1e-12 · t / ‖t‖
    CHECK(d_x.const_view()(0, 1, 1) == doctest::Approx(0.8e10));
}

TEST_CASE_TEMPLATE("cosine_logits: norms whose product overflows", T, float, double) {
    const Cpu policy(1);
    const double largest = std::is_same_v<T, float> ? 2e38 : 1e308, root = std::sqrt(largest) * 10;
    for (const auto& sizes : {std::array{largest, 1.0}, std::array{root, root}, std::array{1.0, largest / 8}}) {
        auto x = filled<T>(policy, std::array<Index, 3>{1, 1, 2}, 0);
        auto token = filled<T>(policy, std::array<Index, 2>{1, 2}, 3 * sizes[1]);
        x.data()[0] = static_cast<T>(sizes[0]);
        token.data()[1] = static_cast<T>(4 * sizes[1]);
        CHECK(cosine_logits(policy, x, token, 2).logits.data()[0] == doctest::Approx(1.2).epsilon(1e-6));
    }
}

TEST_CASE("cosine_logits: the same bits with 1 and 2 threads, and for each sequence alone") {
    const Cpu one(1), two(2);
    const Case<float> c(one, {3, 2, 301, 37});
    const auto saved = cosine_logits(one, c.x, c.token, 8);
    CHECK(same_bits(cosine_logits(two, c.x, c.token, 8).logits, saved.logits));
    const auto gradients = [&](const Cpu& policy) {
        auto d_x = filled<float>(policy, c.x.shape(), 0);
        auto d_token = filled<float>(policy, c.token.shape(), 0);
        cosine_logits_vjp(policy, d_x.view(), d_token.view(), c.d_logits, saved.logits, saved.norms, c.x, c.token, 8);
        return std::pair{std::move(d_x), std::move(d_token)};
    };
    const auto by_one = gradients(one), by_two = gradients(two);
    CHECK(same_bits(by_two.first, by_one.first));
    CHECK(same_bits(by_two.second, by_one.second));
    for (Index b = 0; b < 3; ++b)
        CHECK(same_bits(cosine_logits(two, sequence(c.x, b), c.token, 8).logits, sequence(saved.logits, b)));
}

TEST_CASE("route_logits, cosine_logits: routing tokens of each sample give what each sample gives with them alone") {
    const Cpu policy(2);
    const std::array<Index, 4> shape{3, 2, 131, 17};
    const Case<float> c(policy, shape);
    const auto tokens = normal<float>(policy, std::array<Index, 3>{3, 2, 17}, 5);
    const auto logits = route_logits(policy, c.x, tokens, scale);
    const auto cosine = cosine_logits(policy, c.x, tokens, 8);
    auto d_x = filled<float>(policy, c.x.shape(), 1), d_x_cosine = filled<float>(policy, c.x.shape(), 1);
    auto d_tokens = filled<float>(policy, tokens.shape(), 2),
         d_tokens_cosine = filled<float>(policy, tokens.shape(), 2);
    route_logits_vjp(policy, d_x.view(), d_tokens.view(), c.d_logits, c.x, tokens, scale);
    cosine_logits_vjp(policy, d_x_cosine.view(), d_tokens_cosine.view(), c.d_logits, cosine.logits, cosine.norms, c.x,
                      tokens, 8);
    for (Index b = 0; b < 3; ++b) {
        const auto x = sequence(c.x, b), d_logits = sequence(c.d_logits, b);
        HostTensor<float, 2> token(policy, {2, 17});
        assign(policy, token, tokens.const_view()[b]);
        CHECK(same_bits(sequence(logits, b), route_logits(policy, x, token, scale)));
        const auto alone = cosine_logits(policy, x, token, 8);
        CHECK(same_bits(sequence(cosine.logits, b), alone.logits));

        const auto same_gradients = [&](const auto& of_batch, const auto& of_tokens, auto&& vjp) {
            auto d = filled<float>(policy, x.shape(), 1);
            auto d_token = filled<float>(policy, token.shape(), 2);
            vjp(d.view(), d_token.view());
            CHECK(same_bits(sequence(of_batch, b), d));
            CHECK(std::equal(d_token.data(), d_token.data() + d_token.size(), of_tokens.const_view()[b].data()));
        };
        same_gradients(d_x, d_tokens,
                       [&](auto d, auto d_token) { route_logits_vjp(policy, d, d_token, d_logits, x, token, scale); });
        same_gradients(d_x_cosine, d_tokens_cosine, [&](auto d, auto d_token) {
            cosine_logits_vjp(policy, d, d_token, d_logits, alone.logits, alone.norms, x, token, 8);
        });
    }
    CHECK_THROWS_WITH_AS(route_logits(policy, sequence(c.x, 0), tokens),
                         "colt5: `routing_token` must have shape (1, any, 17), but has (3, 2, 17)", ShapeError);
}

TEST_CASE("route_logits: errors name the argument and both shapes") {
    const Cpu policy(1);
    Case<float> c(policy, {2, 3, 4, 5});
    auto token = normal<float>(policy, std::array<Index, 2>{3, 6}, 0);
    auto d_x = filled<float>(policy, c.x.shape(), 0), wide = filled<float>(policy, std::array<Index, 3>{2, 4, 6}, 0);
    CHECK_THROWS_WITH_AS(route_logits(policy, c.x, token),
                         "colt5: `routing_token` must have shape (any, 5), but has (3, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(route_logits_vjp(policy, d_x.view(), c.token.view(), c.x, c.x, c.token),
                         "colt5: `d_logits` must have shape (2, 3, 4), but has (2, 4, 5)", ShapeError);
    CHECK_THROWS_WITH_AS(route_logits_vjp(policy, wide.view(), c.token.view(), c.d_logits, c.x, c.token),
                         "colt5: `d_x` must have shape (2, 4, 5), but has (2, 4, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(route_logits_vjp(policy, d_x.view(), token.view(), c.d_logits, c.x, c.token),
                         "colt5: `d_routing_token` must have shape (3, 5), but has (3, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(route_logits_vjp(policy, d_x.view(), token.view(), c.d_logits, c.x, token),
                         "colt5: `routing_token` must have shape (any, 5), but has (3, 6)", ShapeError);
    const auto saved = cosine_logits(policy, c.x, c.token, 8);
    CHECK_THROWS_WITH_AS(cosine_logits(policy, c.x, token, 8),
                         "colt5: `routing_token` must have shape (any, 5), but has (3, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(
        cosine_logits_vjp(policy, d_x.view(), c.token.view(), c.d_logits, c.x, saved.norms, c.x, c.token, 8),
        "colt5: `logits` must have shape (2, 3, 4), but has (2, 4, 5)", ShapeError);
    CHECK_THROWS_WITH_AS(
        cosine_logits_vjp(policy, d_x.view(), c.token.view(), c.d_logits, saved.logits, token, c.x, c.token, 8),
        "colt5: `norms` must have shape (2, 4), but has (3, 6)", ShapeError);
}
