// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>

#include <colt5/cpu/expr.hpp>
#include <colt5/cpu/linear.hpp>
#include <colt5/cpu/norm_linear.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

template <typename T>
struct Case {
    Case(const Cpu& policy, Index batch, Index length, Index in, Index out)
        : x(normal<T>(policy, std::array{batch, length, in}, 0, 2)),
          weight(normal<T>(policy, std::array{out, in}, 1)),
          bias(normal<T>(policy, std::array{out}, 2)),
          gain(normal<T>(policy, std::array{in}, 3)),
          shift(normal<T>(policy, std::array{in}, 4)),
          d_y(normal<T>(policy, std::array{batch, length, out}, 5)),
          add(normal<T>(policy, x.shape(), 6)) {}
    LayerNormParameters<const T> layer_norm() const { return {gain.const_view(), shift.const_view()}; }
    RMSNormParameters<const T> rms_norm() const { return {gain.const_view()}; }

    HostTensor<T, 3> x;
    HostTensor<T, 2> weight;
    HostTensor<T, 1> bias, gain, shift;
    HostTensor<T, 3> d_y, add;
};

/// Gradients of everything, which begin with ones.
template <typename T>
struct Gradients {
    Gradients(const Cpu& policy, const Case<T>& c)
        : x(tensor_like(policy, c.x)),
          weight(filled<T>(policy, c.weight.shape(), 1)),
          bias(filled<T>(policy, c.bias.shape(), 1)),
          gain(filled<T>(policy, c.gain.shape(), 1)),
          shift(filled<T>(policy, c.shift.shape(), 1)) {}
    LayerNormParameters<T> of(const LayerNormParameters<const T>&) { return {gain.view(), shift.view()}; }
    RMSNormParameters<T> of(const RMSNormParameters<const T>&) { return {gain.view()}; }

    HostTensor<T, 3> x;
    HostTensor<T, 2> weight;
    HostTensor<T, 1> bias, gain, shift;
};

template <typename T, typename Norm>
Gradients<T> fused(const Cpu& policy, const Case<T>& c, const Norm& norm, bool with_add) {
    Gradients<T> d(policy, c);
    norm_linear_vjp(policy, d.x.view(), c.d_y, c.x, norm, c.weight, d.of(norm), d.weight.view(), d.bias.view(),
                    GradientEpilogue<T, Cpu>{with_add ? c.add.const_view() : TokensView<const T>()});
    return d;
}

template <typename T, typename Norm>
Gradients<T> step_by_step(const Cpu& policy, const Case<T>& c, const Norm& norm, bool with_add) {
    Gradients<T> d(policy, c);
    const auto d_normed =
        linear_vjp(policy, c.d_y, normalize(policy, c.x, norm), c.weight, d.weight.view(), d.bias.view());
    normalize_vjp(policy, d.x.view(), d_normed, c.x, norm, d.of(norm));
    if (with_add) assign(policy, d.x, d.x + c.add);
    return d;
}

template <typename T, typename Norm>
void check_against_steps(const Cpu& policy, const Case<T>& c, const Norm& norm, double tolerance) {
    for (const bool with_bias : {false, true}) {
        const auto bias = with_bias ? c.bias.const_view() : VectorView<const T>();
        CHECK(relative_error(norm_linear(policy, c.x, norm, c.weight, bias),
                             linear(policy, normalize(policy, c.x, norm), c.weight, bias)) <= tolerance);
    }
    for (const bool with_add : {false, true}) {
        const Gradients<T> d = fused(policy, c, norm, with_add), expected = step_by_step(policy, c, norm, with_add);
        CHECK(relative_error(d.x, expected.x) <= tolerance);
        CHECK(relative_error(d.weight, expected.weight) <= tolerance);
        CHECK(relative_error(d.bias, expected.bias) <= tolerance);
        CHECK(relative_error(d.gain, expected.gain) <= tolerance);
        CHECK(relative_error(d.shift, expected.shift) <= tolerance);
    }
}

}  // namespace

TEST_CASE("norm_linear: agrees with the norm and then the linear map, both ways") {
    const Cpu policy(2);
    // Around the tiles of a product (6 rows), the panels (24 to 384 rows) and the lanes of backward (128 rows).
    for (const auto& shape : {std::array<Index, 4>{1, 1, 1, 1},
                              {2, 5, 7, 3},
                              {1, 64, 33, 20},
                              {3, 130, 16, 65},
                              {1, 1500, 12, 9},
                              {2, 0, 3, 4}}) {
        CAPTURE(shape_string(shape));
        const auto [batch, length, in, out] = shape;
        const Case<double> c(policy, batch, length, in, out);
        check_against_steps(policy, c, c.layer_norm(), 1e-12);
        check_against_steps(policy, c, c.rms_norm(), 1e-12);
        const Case<float> f(policy, batch, length, in, out);
        check_against_steps(policy, f, f.rms_norm(), 1e-5);
        if (in > 1) check_against_steps(policy, f, f.layer_norm(), 1e-5);  // of one entry LayerNorm is noise
    }
}

TEST_CASE("norm_linear: the same bits with 1 and 2 threads, and for each sequence alone") {
    const Cpu one(1), two(2);
    const Case<float> c(one, 3, 301, 40, 37);
    const auto norm = c.layer_norm();
    const auto y = norm_linear(one, c.x, norm, c.weight);
    const Gradients<float> d = fused(one, c, norm, true), d2 = fused(two, c, norm, true);
    CHECK(same_bits(norm_linear(two, c.x, norm, c.weight), y));
    CHECK(same_bits(d2.x, d.x));
    CHECK(same_bits(d2.weight, d.weight));
    CHECK(same_bits(d2.bias, d.bias));
    CHECK(same_bits(d2.gain, d.gain));
    CHECK(same_bits(d2.shift, d.shift));
    for (Index b = 0; b < c.x.extent(0); ++b) {
        CHECK(same_bits(norm_linear(two, sequence(c.x, b), norm, c.weight), sequence(y, b)));
        Gradients<float> g(two, c);
        HostTensor<float, 3> d_x(two, {1, 301, 40});
        norm_linear_vjp(two, d_x.view(), sequence(c.d_y, b), sequence(c.x, b), norm, c.weight, g.of(norm),
                        g.weight.view(), g.bias.view(), GradientEpilogue<float, Cpu>{sequence(c.add, b)});
        CHECK(same_bits(d_x, sequence(d.x, b)));
    }
}

TEST_CASE("norm_linear: does not change with the scale of its rows, where squares overflow either") {
    const Cpu policy(1);
    Case<float> c(policy, 2, 70, 37, 19);
    const auto check = [&](auto norm) {
        c.x = times(policy, c.x, 0x1p30);  // ε is nothing beside these
        const auto y = norm_linear(policy, c.x, norm, c.weight, c.bias.const_view());
        const Gradients<float> d = fused(policy, c, norm, false);
        for (const double scale : {0x1p36, 0x1p94}) {
            c.x = times(policy, c.x, scale);
            CHECK(relative_error(norm_linear(policy, c.x, norm, c.weight, c.bias.const_view()), y) <= 1e-6);
            const Gradients<float> large = fused(policy, c, norm, false);
            CHECK(relative_error(times(policy, large.x, scale), d.x) <= 1e-5);
            CHECK(relative_error(large.weight, d.weight) <= 1e-6);
            CHECK(relative_error(large.gain, d.gain) <= 1e-5);
            c.x = times(policy, c.x, 1 / scale);
        }
        c.x = times(policy, c.x, 0x1p-30);
    };
    check(c.rms_norm());
    check(c.layer_norm());
}

TEST_CASE("norm_linear: errors name the argument and both shapes") {
    const Cpu policy(1);
    const Case<float> c(policy, 2, 3, 4, 5), wide(policy, 2, 3, 6, 5);
    CHECK_THROWS_WITH_AS(norm_linear(policy, c.x, wide.rms_norm(), c.weight),
                         "colt5: `norm` must have shape (4), but has (6)", ShapeError);
    CHECK_THROWS_WITH_AS(norm_linear(policy, c.x, c.rms_norm(), wide.weight),
                         "colt5: `weight` must have shape (any, 4), but has (5, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(norm_linear(policy, c.x, c.rms_norm(), c.weight, c.gain.const_view()),
                         "colt5: `bias` must have shape (5), but has (4)", ShapeError);
    Gradients<float> d(policy, c), d_wide(policy, wide);
    const auto vjp = [&](const auto& d_y, auto d_norm, auto d_weight, TokensView<const float> add) {
        norm_linear_vjp(policy, d.x.view(), d_y, c.x, c.rms_norm(), c.weight, d_norm, d_weight, {},
                        GradientEpilogue<float, Cpu>{add});
    };
    const auto d_norm = d.of(c.rms_norm());
    CHECK_THROWS_WITH_AS(vjp(c.x, d_norm, d.weight.view(), {}),
                         "colt5: `d_y` must have shape (2, 3, 5), but has (2, 3, 4)", ShapeError);
    CHECK_THROWS_WITH_AS(vjp(c.d_y, d_wide.of(c.rms_norm()), d.weight.view(), {}),
                         "colt5: `d_norm` must have shape (4), but has (6)", ShapeError);
    CHECK_THROWS_WITH_AS(vjp(c.d_y, d_norm, d_wide.weight.view(), {}),
                         "colt5: `d_weight` must have shape (5, 4), but has (5, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(vjp(c.d_y, d_norm, d.weight.view(), wide.x.const_view()),
                         "colt5: `d_residual` must have shape (2, 3, 4), but has (2, 3, 6)", ShapeError);
}
