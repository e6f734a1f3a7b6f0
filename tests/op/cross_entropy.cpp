// SPDX-License-Identifier: MIT
#include <colt5/op/cross_entropy.hpp>

#include <doctest/doctest.h>

#include <cmath>

#include <colt5/colt5.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr Index batch = 2, length = 7, dim = 5, classes = 9;

HostTensor<TokenIndex, 2> some_targets(const Cpu& policy) {
    HostTensor<TokenIndex, 2> targets(policy, {batch, length});
    for (Index i = 0; i < targets.size(); ++i) targets.data()[i] = static_cast<TokenIndex>((5 * i + 3) % classes);
    targets.data()[4] = -100;
    targets.data()[9] = -1;
    return targets;
}

}  // namespace

TEST_CASE_TEMPLATE("linear_cross_entropy: by its definition, in chunks of any size the same", T, float, double) {
    const double tolerance = std::is_same_v<T, double> ? 1e-13 : 1e-6;
    const Cpu policy(2);
    const auto x = normal<T>(policy, std::array{batch, length, dim}, 0);
    const auto weight = normal<T>(policy, std::array{classes, dim}, 1);
    const auto bias = normal<T>(policy, std::array{classes}, 2);
    const auto targets = some_targets(policy);
    for (const bool with_bias : {false, true}) {
        const auto b = with_bias ? bias.const_view() : VectorView<const T>();
        const auto losses = linear_cross_entropy(policy, x, weight, targets, b);
        for (Index i = 0; i < targets.size(); ++i) {
            double sum = 0, of_target = 0;
            for (Index v = 0; v < classes; ++v) {
                double z = with_bias ? static_cast<double>(bias.data()[v]) : 0;
                for (Index d = 0; d < dim; ++d)
                    z += static_cast<double>(x.data()[i * dim + d]) * static_cast<double>(weight.data()[v * dim + d]);
                sum += std::exp(z);
                if (v == targets.data()[i]) of_target = z;
            }
            const double expected = targets.data()[i] < 0 ? 0 : std::log(sum) - of_target;
            CHECK(static_cast<double>(losses.data()[i]) == doctest::Approx(expected).epsilon(tolerance).scale(1));
        }
        for (const Index at_a_time : {1, 20, 64, 1000})
            CHECK(same_bits(linear_cross_entropy(policy, x, weight, targets, b, {.logits_at_a_time = at_a_time}),
                            losses));
    }
}

TEST_CASE("linear_cross_entropy_vjp: losses, and gradients that are finite differences") {
    const Cpu policy(2);
    auto x = normal<double>(policy, std::array{batch, length, dim}, 0);
    auto weight = normal<double>(policy, std::array{classes, dim}, 1);
    auto bias = normal<double>(policy, std::array{classes}, 2);
    const auto targets = some_targets(policy);
    const auto d_losses = normal<double>(policy, targets.shape(), 3);
    const auto loss = [&] {
        return inner(d_losses, linear_cross_entropy(policy, x, weight, targets, bias.const_view()));
    };
    for (const Index at_a_time : {1, 20, 1000}) {
        auto d_weight = filled<double>(policy, weight.shape(), 2),
             expected_weight = filled<double>(policy, weight.shape(), 2);
        auto d_bias = filled<double>(policy, bias.shape(), 3), expected_bias = filled<double>(policy, bias.shape(), 3);
        const auto result = linear_cross_entropy_vjp(policy, d_losses, x, weight, targets, d_weight.view(),
                                                     bias.const_view(), d_bias.view(), {.logits_at_a_time = at_a_time});
        CHECK(same_bits(result.losses, linear_cross_entropy(policy, x, weight, targets, bias.const_view())));
        CHECK(relative_error(result.d_x, finite_differences(policy, x, loss)) <= 1e-8);
        assign(policy, expected_weight, expected_weight + finite_differences(policy, weight, loss));
        assign(policy, expected_bias, expected_bias + finite_differences(policy, bias, loss));
        CHECK(relative_error(d_weight, expected_weight) <= 1e-8);
        CHECK(relative_error(d_bias, expected_bias) <= 1e-8);
        for (Index d = 0; d < dim; ++d) CHECK(result.d_x.const_view()(0, 4, d) == 0);  // it has no target
    }
}

TEST_CASE_TEMPLATE("linear_cross_entropy: large logits, no tokens, one class", T, float, double) {
    const Cpu policy(1);
    auto x = normal<T>(policy, std::array{batch, length, dim}, 0);
    for (Index i = 0; i < x.size(); ++i) x.data()[i] *= T(1e6);
    const auto weight = normal<T>(policy, std::array{classes, dim}, 1);
    CHECK(linear_cross_entropy(policy, x, weight, some_targets(policy)).vector().allFinite());
    const auto none = linear_cross_entropy(policy, normal<T>(policy, std::array<Index, 3>{2, 0, dim}, 0), weight,
                                           HostTensor<TokenIndex, 2>(policy, {2, 0}));
    CHECK(none.size() == 0);
    const auto single = linear_cross_entropy(policy, x, normal<T>(policy, std::array<Index, 2>{1, dim}, 1),
                                             filled<TokenIndex>(policy, std::array{batch, length}, 0));
    for (Index i = 0; i < single.size(); ++i) CHECK(single.data()[i] == 0);
}

TEST_CASE("linear_cross_entropy: errors name the argument and both values") {
    const Cpu policy(1);
    const auto x = normal<float>(policy, std::array{batch, length, dim}, 0);
    const auto weight = normal<float>(policy, std::array{classes, dim}, 1);
    auto targets = some_targets(policy);
    CHECK_THROWS_WITH_AS(linear_cross_entropy(policy, x, normal<float>(policy, std::array<Index, 2>{9, 4}, 1), targets),
                         "colt5: `weight` must have shape (any, 5), but has (9, 4)", ShapeError);
    CHECK_THROWS_WITH_AS(
        linear_cross_entropy(policy, x, weight, filled<TokenIndex>(policy, std::array<Index, 2>{2, 6}, 0)),
        "colt5: `targets` must have shape (2, 7), but has (2, 6)", ShapeError);
    targets.data()[3] = 9;
    CHECK_THROWS_WITH_AS(linear_cross_entropy(policy, x, weight, targets),
                         "colt5: `targets` must be below the number of classes, 9, but is 9", ValueError);
    CHECK_THROWS_AS(linear_cross_entropy(policy, x, weight, some_targets(policy), {}, {.logits_at_a_time = 0}),
                    ValueError);
}
