// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>

#include <colt5/cpu/dense_attention.hpp>
#include <colt5/cpu/null_key.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

// batch, routes, keys, heads of a route, dim_head
constexpr std::array<std::array<Index, 5>, 6> shapes{
    {{1, 1, 1, 1, 1}, {2, 1, 5, 3, 4}, {3, 2, 7, 2, 5}, {2, 3, 40, 1, 17}, {2, 2, 0, 2, 3}, {0, 2, 3, 2, 3}}};

template <typename T>
struct Case {
    Case(const Cpu& policy, const std::array<Index, 5>& s)
        : kv(normal<T>(policy, std::array<Index, 6>{s[0], s[1], s[2], s[3], 2, s[4]}, 0)),
          null_kv(normal<T>(policy, std::array<Index, 3>{2, s[1] * s[3], s[4]}, 1)),
          mask(random_mask(policy, std::array{s[0], s[1], s[2]}, 2)),
          scale(normal<T>(policy, std::array{s[0], s[1], s[2]}, 3)) {}
    HostTensor<T, 6> kv;
    HostTensor<T, 3> null_kv;
    HostTensor<bool, 3> mask;
    HostTensor<T, 3> scale;
};

}  // namespace

TEST_CASE_TEMPLATE("with_null_key: the null key, never masked and with a scale of 1, then the keys", T, float, double) {
    const Cpu policy(2);
    for (const auto& shape : shapes) {
        CAPTURE(shape_string(shape));
        const auto [batch, routes, keys, per_route, dim_head] = shape;
        const Case<T> c(policy, shape);
        const auto out = with_null_key(policy, c.kv, c.null_kv, c.mask.const_view(), c.scale.const_view());
        CHECK(out.kv.shape() == std::array<Index, 6>{batch, routes, keys + 1, per_route, 2, dim_head});
        CHECK(out.mask.shape() == std::array<Index, 3>{batch, routes, keys + 1});
        CHECK(out.value_scale.shape() == std::array<Index, 3>{batch, routes, keys + 1});
        bool same = true;
        for (Index b = 0; b < batch; ++b)
            for (Index r = 0; r < routes; ++r)
                for (Index j = 0; j <= keys; ++j) {
                    same = same && out.mask.const_view()(b, r, j) == (j == 0 || c.mask.const_view()(b, r, j - 1));
                    same = same &&
                           out.value_scale.const_view()(b, r, j) == (j == 0 ? T(1) : c.scale.const_view()(b, r, j - 1));
                    for (Index h = 0; h < per_route; ++h)
                        for (Index part = 0; part < 2; ++part)
                            for (Index e = 0; e < dim_head; ++e)
                                same = same && out.kv.const_view()(b, r, j, h, part, e) ==
                                                   (j == 0 ? c.null_kv.const_view()(part, r * per_route + h, e)
                                                           : c.kv.const_view()(b, r, j - 1, h, part, e));
                }
        CHECK(same);
        const auto plain = with_null_key(policy, c.kv, c.null_kv, {}, {});
        CHECK(same_bits(plain.kv, out.kv));
        CHECK(!plain.mask);
        CHECK(!plain.value_scale);
    }
}

TEST_CASE("null_key_vjp: gradients without the null key's, which are summed over the batch") {
    const Cpu policy(2);
    for (const auto& shape : shapes) {
        CAPTURE(shape_string(shape));
        Case<double> c(policy, shape);
        const auto out = with_null_key(policy, c.kv, c.null_kv, {}, c.scale.const_view());
        const auto d_out = normal<double>(policy, out.kv.shape(), 4);
        const auto d_out_scale = normal<double>(policy, out.value_scale.shape(), 5);
        auto d_null_kv = filled<double>(policy, c.null_kv.shape(), 3);
        const auto d = null_key_vjp(policy, d_null_kv.view(), d_out, d_out_scale.const_view());
        const auto loss = [&] {
            const auto moved = with_null_key(policy, c.kv, c.null_kv, {}, c.scale.const_view());
            return inner(d_out, moved.kv) + inner(d_out_scale, moved.value_scale);
        };
        CHECK(relative_error(d.d_kv, finite_differences(policy, c.kv, loss)) <= 1e-8);
        CHECK(relative_error(d.d_value_scale, finite_differences(policy, c.scale, loss)) <= 1e-8);
        auto expected = finite_differences(policy, c.null_kv, loss);
        for (Index i = 0; i < expected.size(); ++i) expected.data()[i] += 3;  // it accumulates
        CHECK(relative_error(d_null_kv, expected) <= 1e-8);
        auto other = filled<double>(policy, c.null_kv.shape(), 3);
        const auto without_scale = null_key_vjp(policy, other.view(), d_out, {});
        CHECK(same_bits(other, d_null_kv));
        CHECK(same_bits(without_scale.d_kv, d.d_kv));
        CHECK(!without_scale.d_value_scale);
    }
}

TEST_CASE("with_null_key: errors name the argument and both shapes") {
    const Cpu policy(1);
    const Case<double> c(policy, {2, 2, 3, 2, 4});
    const auto few = normal<double>(policy, std::array<Index, 3>{2, 3, 4}, 0);
    const auto short_scale = normal<double>(policy, std::array<Index, 3>{2, 2, 2}, 0);
    CHECK_THROWS_WITH_AS(with_null_key(policy, c.kv, few, {}, {}),
                         "colt5: `null_kv` must have shape (2, 4, 4), but has (2, 3, 4)", ShapeError);
    CHECK_THROWS_WITH_AS(with_null_key(policy, c.kv, c.null_kv, {}, short_scale.const_view()),
                         "colt5: `value_scale` must have shape (2, 2, 3), but has (2, 2, 2)", ShapeError);
    auto d_few = filled<double>(policy, few.shape(), 0);
    CHECK_THROWS_WITH_AS(null_key_vjp(policy, d_few.view(), c.kv, {}),
                         "colt5: `d_null_kv` must have shape (2, 4, 4), but has (2, 3, 4)", ShapeError);
}
