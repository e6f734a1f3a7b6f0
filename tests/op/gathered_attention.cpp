// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>

#include <colt5/cpu/gathered_attention.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr Index heads = 3, dim_head = 5, rows = 40;

struct Problem {
    Index batch, queries, keys;
};
// More keys than rows, so that several parts are gathered one after the other; none of some.
constexpr Problem problems[] = {{1, 1, 1},  {4, 3, 9}, {7, 2, 41}, {3, 66, 300},
                                {7, 0, 41}, {2, 0, 4}, {2, 3, 0},  {0, 2, 3}};

template <typename T>
struct Case {
    Case(const Cpu& policy, const Problem& p)
        : q(normal<T>(policy, std::array{p.batch, p.queries, heads, dim_head}, 0)),
          kv(normal<T>(policy, std::array{rows, heads, Index{2}, dim_head}, 1)),
          scale(normal<T>(policy, std::array{p.batch, Index{1}, p.keys}, 2)),
          d_out(normal<T>(policy, q.shape(), 3)),
          indices(policy, scale.shape()),
          mask(policy, scale.shape()) {
        for (Index i = 0; i < indices.size(); ++i) {
            indices.data()[i] = static_cast<TokenIndex>(i * i % 37 * 3 % rows);
            mask.data()[i] = i % 5 != 2;
        }
    }
    Tensor<T, Cpu, dynamic, dynamic, dynamic, dynamic> q, kv;
    TokensTensor<T, Cpu> scale;
    Tensor<T, Cpu, dynamic, dynamic, dynamic, dynamic> d_out;
    TokensTensor<TokenIndex, Cpu> indices;
    TokensTensor<bool, Cpu> mask;
};

}  // namespace

TEST_CASE_TEMPLATE("gathered_attention: dense attention to copies of the rows, bit for bit", T, float, double) {
    const Cpu policy(2);
    for (const Problem& p : problems) {
        CAPTURE(shape_string(std::array{p.batch, p.queries, p.keys}));
        const Case<T> c(policy, p);
        const auto flat = c.indices.const_view().reshape(std::array{Index{1}, p.batch * p.keys});
        const auto copies =
            gather(policy, c.kv.const_view().reshape(std::array{Index{1}, rows, heads * 2 * dim_head}), flat);
        const auto kv = copies.const_view().reshape(std::array{p.batch, Index{1}, p.keys, heads, Index{2}, dim_head});
        for (const bool with : {false, true}) {
            const KeyMask mask = with ? KeyMask(c.mask.const_view()) : KeyMask();
            const auto scale = with ? c.scale.const_view() : TokensView<const T>();
            const auto saved = gathered_attention_forward(policy, c.q, c.kv, c.indices.const_view(), mask, scale);
            const auto expected = dense_attention_forward(policy, c.q, kv, mask, scale);
            CHECK(same_bits(saved.out, expected.out));
            CHECK(same_bits(saved.log_sum_exp, expected.log_sum_exp));
            const auto d =
                gathered_attention_vjp(policy, saved, c.d_out, c.q, c.kv, c.indices.const_view(), mask, scale);
            const auto expected_d = dense_attention_vjp(policy, expected, c.d_out, c.q, kv, mask, scale);
            CHECK(same_bits(d.d_q, expected_d.d_q));
            CHECK(same_bits(d.d_kv, expected_d.d_kv));
            REQUIRE(d.d_value_scale.shape() == expected_d.d_value_scale.shape());
            if (with) CHECK(same_bits(d.d_value_scale, expected_d.d_value_scale));
        }
    }
}

TEST_CASE("gathered_attention: without queries, empty tensors need no memory, and the gradients of keys are 0") {
    const Cpu policy(1);
    Case<double> c(policy, {7, 0, 41});
    using Queries = Tensor<double, Cpu, dynamic, dynamic, dynamic, dynamic>;
    const auto q = Queries::adopt(nullptr, c.q.shape()), d_out = Queries::adopt(nullptr, c.q.shape());
    const KeyMask mask(c.mask.const_view());
    const auto scale = c.scale.const_view();
    const auto saved = gathered_attention_forward(policy, q, c.kv, c.indices.const_view(), mask, scale);
    const auto d = gathered_attention_vjp(policy, saved, d_out, q, c.kv, c.indices.const_view(), mask, scale);
    CHECK(inner(d.d_kv, d.d_kv) == 0);
    CHECK(inner(d.d_value_scale, d.d_value_scale) == 0);
}

TEST_CASE("gathered_attention: errors name the argument and both values") {
    const Cpu policy(1);
    Case<double> c(policy, {2, 3, 4});
    const auto run = [&] { return gathered_attention_forward(policy, c.q, c.kv, c.indices.const_view(), {}, {}); };
    c.indices.data()[5] = rows;
    CHECK_THROWS_AS(run(), ValueError);
    c.indices = {policy, {3, 1, 4}};
    CHECK_THROWS_WITH_AS(run(), "colt5: `indices` must have shape (2, 1, any), but has (3, 1, 4)", ShapeError);
    c.indices = {policy, {2, 1, 4}};
    c.kv = {policy, {rows, heads, 2, 4}};
    CHECK_THROWS_WITH_AS(run(), "colt5: `kv` must have shape (any, 3, 2, 5), but has (40, 3, 2, 4)", ShapeError);
}
