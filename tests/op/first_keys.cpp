// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <type_traits>

#include <colt5/cpu/dense_attention.hpp>
#include <colt5/cpu/relative_position_bias.hpp>

#include "support/tensors.hpp"

/// dense_attention with FirstKeys.
using namespace colt5;
using namespace support;

namespace {

struct Problem {
    Index batch, routes, queries, keys, heads_per_route, dim_head, groups;
};
constexpr Problem problems[] = {{2, 1, 3, 5, 2, 3, 1}, {2, 2, 7, 4, 3, 4, 3},     {1, 2, 66, 300, 1, 4, 2},
                                {1, 1, 3, 0, 1, 2, 1}, {1, 1, 130, 600, 2, 3, 2}, {1, 1, 5, 1, 1, 3, 1}};

template <typename T>
struct Case {
    Case(const Cpu& policy, const Problem& p, bool masked)
        : q(normal<T>(policy, std::array{p.batch, p.queries, p.routes * p.heads_per_route, p.dim_head}, 30)),
          kv(normal<T>(policy, std::array{p.batch, p.routes, p.keys, p.heads_per_route, Index{2}, p.dim_head}, 31)),
          scale(normal<T>(policy, std::array{p.batch, p.routes, p.keys}, 32)),
          d_out(normal<T>(policy, q.shape(), 33)),
          counts(policy, {p.batch, p.groups, p.queries}) {
        // From a negative number to more than the keys there are, with many of 0 and 1.
        for (Index i = 0; i < counts.size(); ++i)
            counts.data()[i] = static_cast<TokenIndex>(i % 5 < 2 ? i % 5 : i * 37 % (p.keys + 4) - 1);
        if (masked) mask = random_mask(policy, scale.shape(), 34);
    }
    auto first_keys() const { return FirstKeys<>{{}, counts.const_view()}; }

    HostTensor<T, 4> q;
    HostTensor<T, 6> kv;
    TokensTensor<T, Cpu> scale;
    HostTensor<T, 4> d_out;
    TokensTensor<TokenIndex, Cpu> counts;
    TokensTensor<bool, Cpu> mask;
};

template <typename T, typename Bias>
auto forward(const Cpu& policy, const Case<T>& c, const Bias& bias) {
    return dense_attention_forward(policy, c.q, c.kv, c.mask.const_view(), c.scale.const_view(), bias);
}
template <typename T, typename Bias>
auto backward(const Cpu& policy, const Case<T>& c, const Bias& bias) {
    return dense_attention_vjp(policy, forward(policy, c, bias), c.d_out, c.q, c.kv, c.mask.const_view(),
                               c.scale.const_view(), bias);
}

/// One query at a time, with a mask instead of a count.
template <typename T>
HostTensor<T, 4> one_by_one(const Cpu& policy, const Case<T>& c) {
    const auto [batch, queries, heads, dim] = c.q.shape();
    const Index routes = c.kv.extent(1), keys = c.kv.extent(2), groups = c.counts.extent(1);
    auto out = filled<T>(policy, c.q.shape(), T(0));
    for (Index h = 0; h < heads; ++h)
        for (Index i = 0; i < queries; ++i) {
            TokensTensor<bool, Cpu> mask(policy, {batch, routes, keys});
            for (Index b = 0; b < batch; ++b)
                for (Index r = 0; r < routes; ++r)
                    for (Index j = 0; j < keys; ++j)
                        mask.view()(b, r, j) = j < c.counts.const_view()(b, h * groups / heads, i) &&
                                               (!c.mask || c.mask.const_view()(b, r, j));
            HostTensor<T, 4> q(policy, {batch, 1, heads, dim});
            for (Index b = 0; b < batch; ++b)
                std::copy_n(&c.q.const_view()(b, i, 0, 0), heads * dim, &q.view()(b, 0, 0, 0));
            const auto of_query = dense_attention_forward(policy, q, c.kv, mask.const_view(), c.scale.const_view());
            for (Index b = 0; b < batch; ++b)
                std::copy_n(&of_query.out.const_view()(b, 0, h, 0), dim, &out.view()(b, i, h, 0));
        }
    return out;
}

}  // namespace

TEST_CASE("FirstKeys: agrees with a mask for each query; gradients by finite differences") {
    const Cpu policy(2);
    for (const Problem& p : problems)
        for (const bool masked : {false, true}) {
            CAPTURE(p.queries);
            CAPTURE(masked);
            Case<double> c(policy, p, masked);
            const Case<float> f(policy, p, masked);
            const auto first = c.first_keys();
            const auto expected = one_by_one(policy, c);
            CHECK(relative_error(forward(policy, c, first).out, expected) <= 1e-13);
            CHECK(relative_error(forward(policy, f, f.first_keys()).out, expected) <= 2e-6);
            const auto d = backward(policy, c, first);
            const auto loss = [&] { return inner(c.d_out, forward(policy, c, first).out); };
            CHECK(directional_error(policy, c.q, d.d_q, loss) <= 1e-7);
            CHECK(directional_error(policy, c.kv, d.d_kv, loss) <= 1e-7);
            CHECK(directional_error(policy, c.scale, d.d_value_scale, loss) <= 1e-7);
            if (c.kv.size() < 300) CHECK(relative_error(d.d_kv, finite_differences(policy, c.kv, loss)) <= 1e-7);
            const auto d_f = backward(policy, f, f.first_keys());
            CHECK(relative_error(d_f.d_kv, d.d_kv) <= 1e-5);
        }
}

TEST_CASE("FirstKeys: the relative position bias is that of the keys seen") {
    const Cpu policy(2);
    const Case<double> c(policy, {2, 2, 7, 9, 1, 3, 2}, true);
    const RelativePositionBuckets buckets{8, 6};
    auto table = normal<double>(policy, std::array<Index, 2>{8, 2}, 40);
    const auto run = [&](auto&& f) {
        const auto by_distance = relative_position_bias(policy, buckets, table, 6);
        return f(FirstKeys<RoutedPositionBias<double>>{{{buckets, by_distance.const_view()}, {}, {}, 1},
                                                       c.counts.const_view()});
    };
    // The same numbers as those of a route of its own for each query and head.
    auto expected = forward(policy, c, c.first_keys()).out;
    run([&](const auto& bias) {
        for (Index b = 0; b < 2; ++b)
            for (Index h = 0; h < 2; ++h)
                for (Index i = 0; i < 7; ++i) {
                    double sum = 0;
                    std::array<double, 3> out{};
                    for (Index j = 0; j < std::min(Index{9}, Index{c.counts.const_view()(b, h, i)}); ++j) {
                        if (!c.mask.const_view()(b, h, j)) continue;
                        const Index distance = std::clamp(j - 1 - i, Index{-6}, Index{6});
                        double s = j == 0 ? 0 : bias.by_distance(h, 6 + distance);
                        for (Index e = 0; e < 3; ++e)
                            s += c.q.const_view()(b, i, h, e) * c.kv.const_view()(b, h, j, 0, 0, e) / std::sqrt(3.0);
                        sum += std::exp(s);
                        for (Index e = 0; e < 3; ++e)
                            out[static_cast<std::size_t>(e)] +=
                                std::exp(s) * c.scale.const_view()(b, h, j) * c.kv.const_view()(b, h, j, 0, 1, e);
                    }
                    for (Index e = 0; e < 3; ++e)
                        expected.view()(b, i, h, e) = sum > 0 ? out[static_cast<std::size_t>(e)] / sum : 0;
                }
        CHECK(relative_error(forward(policy, c, bias).out, expected) <= 1e-13);
        return 0;
    });
    auto d_table = filled<double>(policy, table.shape(), 0);
    run([&](const auto& bias) {
        dense_attention_vjp(policy, forward(policy, c, bias), c.d_out, c.q, c.kv, c.mask.const_view(),
                            c.scale.const_view(), bias, d_table.view());
        return 0;
    });
    const auto loss = [&] {
        return run([&](const auto& bias) { return inner(c.d_out, forward(policy, c, bias).out); });
    };
    CHECK(relative_error(d_table, finite_differences(policy, table, loss)) <= 1e-7);
}

TEST_CASE_TEMPLATE("FirstKeys: what hidden keys hold changes no bit, whatever it is", T, float, double) {
    const Cpu policy(2);
    for (const double value :
         {1e4, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
        Case<T> c(policy, {1, 2, 70, 300, 2, 3, 1}, false);
        for (Index i = 0; i < 70; ++i) c.counts.data()[i] = static_cast<TokenIndex>(i < 60 ? 3 * i : 0);
        const auto saved = forward(policy, c, c.first_keys());
        const auto d = backward(policy, c, c.first_keys());
        for (Index r = 0; r < 2; ++r)
            for (Index j = 178; j < 300; ++j) {  // the last query sees 177
                std::fill_n(&c.kv.view()(0, r, j, 0, 0, 0), 12, static_cast<T>(value));
                for (Index e = 0; e < 12; ++e) CHECK((&d.d_kv.const_view()(0, r, j, 0, 0, 0))[e] == 0);
                CHECK(d.d_value_scale.const_view()(0, r, j) == 0);
            }
        const auto actual = forward(policy, c, c.first_keys());
        const auto actual_d = backward(policy, c, c.first_keys());
        CHECK(same_bits(actual.out, saved.out));
        CHECK(same_bits(actual.log_sum_exp, saved.log_sum_exp));
        CHECK(same_bits(actual_d.d_q, d.d_q));
        CHECK(to_host(policy, actual_d.d_kv) == to_host(policy, d.d_kv));
        for (const Index i : {0, 65})
            for (Index e = 0; e < 12; ++e) {
                CHECK((&saved.out.const_view()(0, i, 0, 0))[e] == 0);
                CHECK((&d.d_q.const_view()(0, i, 0, 0))[e] == 0);
            }
    }
    // The scale of a hidden value.
    Case<T> hidden(policy, {1, 1, 70, 300, 1, 3, 1}, false);
    std::fill_n(hidden.counts.data(), 70, 20);
    const auto without = forward(policy, hidden, hidden.first_keys());
    hidden.scale.view()(0, 0, 20) = std::numeric_limits<T>::quiet_NaN();
    CHECK(same_bits(forward(policy, hidden, hidden.first_keys()).out, without.out));
    // A key in the middle: it reaches the queries that see it, and nothing else.
    Case<T> c(policy, {1, 1, 70, 300, 1, 3, 1}, false);
    for (Index i = 0; i < 70; ++i) c.counts.data()[i] = static_cast<TokenIndex>(4 * i);
    const auto before = forward(policy, c, c.first_keys());
    const auto d_before = backward(policy, c, c.first_keys());
    c.kv.view()(0, 0, 100, 0, 0, 1) = c.kv.view()(0, 0, 100, 0, 1, 1) = std::numeric_limits<T>::quiet_NaN();
    const auto after = forward(policy, c, c.first_keys());
    const auto d_after = backward(policy, c, c.first_keys());
    for (Index i = 0; i < 70; ++i) {
        const bool sees = 4 * i > 100;
        CHECK(std::isnan(after.out.const_view()(0, i, 0, 0)) == sees);
        CHECK(std::isnan(d_after.d_q.const_view()(0, i, 0, 0)) == sees);
        if (sees) continue;
        CHECK(same_bits(after.out.view()[0][i], before.out.view()[0][i]));
        CHECK(same_bits(d_after.d_q.view()[0][i], d_before.d_q.view()[0][i]));
    }
}

TEST_CASE_TEMPLATE("FirstKeys: the logit of the only key has no gradient", T, float, double) {
    const Cpu policy(1);
    Case<T> c(policy, {1, 1, 70, 300, 2, 19, 1}, false);
    std::fill_n(c.counts.data(), 70, 1);
    const auto d = backward(policy, c, c.first_keys());
    for (Index i = 0; i < d.d_q.size(); ++i) CHECK(d.d_q.data()[i] == 0);
}

TEST_CASE("FirstKeys: without counts all keys are seen; errors name both shapes") {
    const Cpu policy(1);
    const Case<double> c(policy, {2, 2, 7, 9, 1, 3, 2}, true);
    CHECK(same_bits(forward(policy, c, FirstKeys<>{}).out, forward(policy, c, NoBias()).out));
    const TokensTensor<TokenIndex, Cpu> longer(policy, {2, 2, 8}), many(policy, {2, 3, 7});
    CHECK_THROWS_WITH_AS(forward(policy, c, FirstKeys<>{{}, longer.const_view()}),
                         "colt5: `counts` must have shape (2, any, 7), but has (2, 2, 8)", ShapeError);
    CHECK_THROWS_WITH_AS(forward(policy, c, FirstKeys<>{{}, many.const_view()}),
                         "colt5: `groups of counts` must be a divisor of 2 heads, but is 3", ValueError);
}
