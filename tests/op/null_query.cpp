// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>

#include <colt5/cpu/null_query.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

HostTensor<TokenIndex, 2> indices_of(const Cpu& policy, Index batch, Index picks, Index length) {
    HostTensor<TokenIndex, 2> indices(policy, {batch, picks});
    fill_with(policy, indices, [&](std::size_t i) { return static_cast<Index>(i * i * 7 + i) % length; });
    return indices;
}

}  // namespace

TEST_CASE("unrouted_tokens: the real tokens that no index names") {
    const Cpu policy(2);
    for (const auto& shape : std::array<std::array<Index, 3>, 4>{{{1, 1, 1}, {2, 3, 9}, {3, 0, 4}, {2, 300, 200}}}) {
        const auto [batch, picks, length] = shape;
        CAPTURE(shape[2]);
        const auto indices = indices_of(policy, batch, picks, length);
        const auto some = random_mask(policy, std::array{batch, length}, 1);
        const auto some_live = random_mask(policy, std::array{batch, picks}, 2);
        for (const Mask mask : {Mask(), some.const_view()})
            for (const Mask live : {Mask(), some_live.const_view()}) {
                auto expected = filled<bool>(policy, std::array{batch, length}, true);
                for (Index b = 0; b < batch; ++b) {
                    for (Index i = 0; i < length; ++i) expected.view()(b, i) = !mask || mask(b, i);
                    for (Index i = 0; i < picks; ++i)
                        if (!live || live(b, i)) expected.view()(b, indices.const_view()(b, i)) = false;
                }
                CHECK(same_bits(unrouted_tokens(policy, indices, mask, length, live), expected));
            }
    }
    const auto indices = indices_of(policy, 2, 3, 9);
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 8}, 1);
    CHECK_THROWS_WITH_AS(unrouted_tokens(policy, indices, mask.const_view(), 9),
                         "colt5: `mask` must have shape (2, 9), but has (2, 8)", ShapeError);
    CHECK_THROWS_AS(unrouted_tokens(policy, indices, {}, 2), ValueError);
}

TEST_CASE_TEMPLATE("add_null_query: the token for unrouted rows; its gradient is the sum over them", T, float, double) {
    const double tolerance = std::is_same_v<T, double> ? 1e-14 : 1e-5;
    const Cpu policy(2);
    for (const auto& shape :
         std::array<std::array<Index, 3>, 5>{{{1, 1, 1}, {2, 9, 5}, {3, 150, 17}, {2, 0, 3}, {0, 2, 3}}}) {
        const auto [batch, length, dim] = shape;
        CAPTURE(shape[1]);
        const auto token = normal<T>(policy, std::array{dim}, 0);
        const auto before = normal<T>(policy, std::array{batch, length, dim}, 1);
        const auto d_out = normal<T>(policy, before.shape(), 2);
        const auto unrouted = random_mask(policy, std::array{batch, length}, 3);
        auto out = copy_of(policy, before);
        add_null_query(policy, out.view(), token, unrouted.const_view());
        auto expected = copy_of(policy, before);
        auto d_token = filled<T>(policy, token.shape(), 2);
        auto expected_d = filled<T>(policy, token.shape(), 2);  // it accumulates
        null_query_vjp(policy, d_token.view(), d_out, unrouted.const_view());
        for (Index b = 0; b < batch; ++b)
            for (Index i = 0; i < length; ++i)
                for (Index j = 0; j < dim && unrouted.const_view()(b, i); ++j) {
                    expected.view()(b, i, j) += token.data()[j];
                    expected_d.view()(j) += d_out.const_view()(b, i, j);
                }
        CHECK(same_bits(out, expected));
        CHECK(relative_error(d_token, expected_d) <= tolerance);
    }
}

TEST_CASE("add_null_query: errors name the argument and both shapes") {
    const Cpu policy(1);
    auto out = normal<double>(policy, std::array<Index, 3>{2, 4, 3}, 0);
    auto token = normal<double>(policy, std::array<Index, 1>{3}, 0),
         wide = normal<double>(policy, std::array<Index, 1>{5}, 0);
    const auto unrouted = random_mask(policy, std::array<Index, 2>{2, 4}, 1),
               few = random_mask(policy, std::array<Index, 2>{2, 3}, 1);
    CHECK_THROWS_WITH_AS(add_null_query(policy, out.view(), wide, unrouted.const_view()),
                         "colt5: `null_token` must have shape (3), but has (5)", ShapeError);
    CHECK_THROWS_WITH_AS(add_null_query(policy, out.view(), token, few.const_view()),
                         "colt5: `unrouted` must have shape (2, 4), but has (2, 3)", ShapeError);
    CHECK_THROWS_WITH_AS(null_query_vjp(policy, wide.view(), out, unrouted.const_view()),
                         "colt5: `d_null_token` must have shape (3), but has (5)", ShapeError);
}
