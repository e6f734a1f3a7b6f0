// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <colt5/cpu/dense_attention.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

struct Problem {
    Index batch, routes, queries, keys, heads_per_route, dim_head;
};
// Around the tiles of 64 queries and the blocks of 256 keys.
constexpr Problem problems[] = {{1, 1, 1, 1, 1, 1},   {2, 1, 3, 5, 2, 3},     {2, 2, 7, 4, 3, 4},
                                {1, 3, 5, 9, 1, 5},   {1, 1, 64, 8, 1, 8},    {1, 2, 65, 257, 1, 4},
                                {2, 1, 3, 256, 1, 2}, {1, 1, 130, 600, 1, 3}, {2, 1, 0, 4, 1, 2},
                                {2, 2, 5, 0, 1, 3},   {0, 1, 3, 4, 1, 2}};

std::string describe(const Problem& p) {
    return shape_string(std::array{p.batch, p.routes, p.queries, p.keys, p.heads_per_route, p.dim_head});
}

template <typename T>
struct Case {
    Case(const Cpu& policy, const Problem& p, bool masked, bool scaled)
        : q(normal<T>(policy, std::array{p.batch, p.queries, p.routes * p.heads_per_route, p.dim_head}, 30)),
          kv(normal<T>(policy, std::array{p.batch, p.routes, p.keys, p.heads_per_route, Index{2}, p.dim_head}, 31)),
          value_scale(normal<T>(policy, std::array{p.batch, p.routes, p.keys}, 32)),
          d_out(normal<T>(policy, q.shape(), 33)) {
        if (scaled) scale = value_scale.const_view();
        if (!masked) return;
        mask_tensor = random_mask(policy, value_scale.shape(), 34);
        if (p.batch * p.routes > 1) std::fill_n(mask_tensor.data(), p.keys, false);  // a route without a real key
        mask = mask_tensor.const_view();
    }
    HostTensor<T, 4> q;
    HostTensor<T, 6> kv;
    TokensTensor<T, Cpu> value_scale;
    HostTensor<T, 4> d_out;
    TokensView<const T> scale;
    TokensTensor<bool, Cpu> mask_tensor;
    KeyMask mask;
};

HostTensor<double, 4> naive(const Cpu& policy, const Case<double>& c) {
    auto out = filled<double>(policy, c.q.shape(), 0);
    const auto [batch, queries, heads, dim] = out.shape();
    const Index keys = c.kv.extent(2), per_route = c.kv.extent(3);
    for (Index b = 0; b < batch; ++b)
        for (Index h = 0; h < heads; ++h)
            for (Index i = 0; i < queries; ++i) {
                const Index r = h / per_route, in_route = h % per_route;
                std::vector<double> p(static_cast<std::size_t>(keys), 0.0);
                double largest = -std::numeric_limits<double>::infinity(), sum = 0;
                for (const bool second_saved : {false, true})
                    for (Index j = 0; j < keys; ++j) {
                        if (c.mask && !c.mask(b, r, j)) continue;
                        double s = 0;
                        for (Index e = 0; e < dim; ++e)
                            s += c.q.view()(b, i, h, e) * c.kv.view()(b, r, j, in_route, 0, e);
                        s /= std::sqrt(static_cast<double>(dim));
                        if (second_saved)
                            sum += p[static_cast<std::size_t>(j)] = std::exp(s - largest);
                        else
                            largest = std::max(largest, s);
                    }
                for (Index j = 0; j < keys; ++j) {
                    const double weight = p[static_cast<std::size_t>(j)] * (c.scale ? c.scale(b, r, j) : 1.0);
                    if (weight == 0) continue;
                    for (Index e = 0; e < dim; ++e)
                        out.view()(b, i, h, e) += weight / sum * c.kv.view()(b, r, j, in_route, 1, e);
                }
            }
    return out;
}

template <typename T>
auto forward(const Cpu& policy, const Case<T>& c) {
    return dense_attention_forward(policy, c.q, c.kv, c.mask, c.scale);
}
template <typename T>
auto backward(const Cpu& policy, const Case<T>& c, const DenseAttentionActivations<T, Cpu>& saved) {
    return dense_attention_vjp(policy, saved, c.d_out, c.q, c.kv, c.mask, c.scale);
}

}  // namespace

TEST_CASE("dense_attention: agrees with a loop over all pairs, in double and float") {
    const Cpu policy(2);
    for (const Problem& p : problems)
        for (const bool masked : {false, true})
            for (const bool scaled : {false, true}) {
                CAPTURE(describe(p));
                CAPTURE(masked);
                CAPTURE(scaled);
                const Case<double> c(policy, p, masked, scaled);
                const Case<float> f(policy, p, masked, scaled);
                const auto expected = naive(policy, c);
                CHECK(relative_error(forward(policy, c).out, expected) <= 1e-13);
                CHECK(relative_error(forward(policy, f).out, expected) <= 2e-6);
            }
}

TEST_CASE("dense_attention: the gradients are those of finite differences") {
    const Cpu policy(1);
    for (const Problem& p : problems)
        for (const bool masked : {false, true})
            for (const bool scaled : {false, true}) {
                CAPTURE(describe(p));
                CAPTURE(masked);
                CAPTURE(scaled);
                Case<double> c(policy, p, masked, scaled);
                const auto d = backward(policy, c, forward(policy, c));
                const auto loss = [&] { return inner(c.d_out, forward(policy, c).out); };
                if (c.q.size() + c.kv.size() < 300) {
                    if (p.keys > 1)
                        CHECK(relative_error(d.d_q, finite_differences(policy, c.q, loss)) <= 1e-7);
                    else
                        CHECK(inner(d.d_q, d.d_q) == 0);
                    CHECK(relative_error(d.d_kv, finite_differences(policy, c.kv, loss)) <= 1e-7);
                } else {
                    CHECK(directional_error(policy, c.q, d.d_q, loss) <= 1e-7);
                    CHECK(directional_error(policy, c.kv, d.d_kv, loss) <= 1e-7);
                }
                REQUIRE(static_cast<bool>(d.d_value_scale) == scaled);
                if (scaled) {
                    if (p.keys < 20)
                        CHECK(relative_error(d.d_value_scale, finite_differences(policy, c.value_scale, loss)) <= 1e-7);
                    else
                        CHECK(directional_error(policy, c.value_scale, d.d_value_scale, loss) <= 1e-7);
                }

                const Case<float> f(policy, p, masked, scaled);
                const auto d_f = backward(policy, f, forward(policy, f));
                if (p.keys > 1) CHECK(relative_error(d_f.d_q, d.d_q) <= 1e-5);
                CHECK(relative_error(d_f.d_kv, d.d_kv) <= 1e-5);
                if (scaled) CHECK(relative_error(d_f.d_value_scale, d.d_value_scale) <= 1e-5);
            }
}

TEST_CASE("dense_attention: a fully masked route gives zeros and no gradient, and never NaN") {
    const Cpu policy(1);
    for (const Index keys : {5, 300}) {
        Case<double> c(policy, {2, 2, 70, keys, 2, 3}, true, true);
        std::fill_n(c.mask_tensor.data(), 2 * keys, false);  // both routes of the first sequence
        const auto saved = forward(policy, c);
        const auto d = backward(policy, c, saved);
        for (const double y : to_host(policy, sequence(saved.out, 0))) CHECK(y == 0);
        for (const double l : to_host(policy, sequence(saved.log_sum_exp, 0)))
            CHECK(l == -std::numeric_limits<double>::infinity());
        for (const double g : to_host(policy, sequence(d.d_q, 0))) CHECK(g == 0);
        for (const double g : to_host(policy, sequence(d.d_kv, 0))) CHECK(g == 0);
        for (const double g : to_host(policy, sequence(d.d_value_scale, 0))) CHECK(g == 0);
        CHECK(inner(sequence(saved.out, 1), sequence(saved.out, 1)) > 0);
    }
}

TEST_CASE_TEMPLATE("dense_attention: what masked keys hold changes no bit", T, float, double) {
    const Cpu policy(2);
    Case<T> c(policy, {2, 2, 70, 300, 2, 3}, true, true);
    const auto saved = forward(policy, c);
    const auto d = backward(policy, c, saved);
    const auto noise = normal<T>(policy, c.kv.shape(), 99, 1e4);
    for (Index j = 0; j < 2 * 2 * 300; ++j) {
        if (c.mask.data()[j]) continue;
        std::copy_n(noise.data() + j * 12, 12, c.kv.data() + j * 12);
        c.value_scale.data()[j] = T(1e4);
        for (Index e = 0; e < 12; ++e) CHECK(d.d_kv.data()[j * 12 + e] == 0);
        CHECK(d.d_value_scale.data()[j] == 0);
    }
    const auto noisy = forward(policy, c);
    const auto noisy_d = backward(policy, c, noisy);
    CHECK(same_bits(noisy.out, saved.out));
    CHECK(same_bits(noisy.log_sum_exp, saved.log_sum_exp));
    CHECK(same_bits(noisy_d.d_q, d.d_q));
    CHECK(to_host(policy, noisy_d.d_kv) == to_host(policy, d.d_kv));
    CHECK(to_host(policy, noisy_d.d_value_scale) == to_host(policy, d.d_value_scale));
}

TEST_CASE_TEMPLATE("dense_attention: what is not finite in masked keys counts as zeros", T, float, double) {
    const Cpu policy(2);
    for (const bool scaled : {false, true}) {
        CAPTURE(scaled);
        Case<T> c(policy, {2, 2, 70, 300, 2, 3}, true, scaled);
        const auto fill_masked = [&](T value) {
            for (Index j = 0; j < 2 * 2 * 300; ++j)
                if (!c.mask.data()[j]) {
                    std::fill_n(c.kv.data() + j * 12, 12, value);
                    c.value_scale.data()[j] = value;
                }
        };
        fill_masked(0);
        const auto saved = forward(policy, c);
        const auto d = backward(policy, c, saved);
        for (const double value : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
                                   -std::numeric_limits<double>::infinity(), 3e38}) {
            CAPTURE(value);
            fill_masked(static_cast<T>(value));
            const auto actual = forward(policy, c);
            const auto actual_d = backward(policy, c, actual);
            CHECK(same_bits(actual.out, saved.out));
            CHECK(same_bits(actual.log_sum_exp, saved.log_sum_exp));
            CHECK(same_bits(actual_d.d_q, d.d_q));
            CHECK(to_host(policy, actual_d.d_kv) == to_host(policy, d.d_kv));
            if (scaled) CHECK(to_host(policy, actual_d.d_value_scale) == to_host(policy, d.d_value_scale));
        }
    }
}

TEST_CASE_TEMPLATE("dense_attention: what is not finite reaches what sees it and nothing else", T, float, double) {
    const Cpu policy(2);
    const T nan = std::numeric_limits<T>::quiet_NaN();
    const auto all_nan = [](const T* row, Index count) {
        return std::all_of(row, row + count, [](T x) { return std::isnan(x); });
    };
    // A query: its own row, and the keys that it sees, which are those that are not masked.
    for (const bool of_gradient : {false, true})
        for (const Index at : {0, 69}) {
            Case<T> c(policy, {1, 2, 70, 300, 1, 3}, true, true);
            for (Index j = 0; j < 600; ++j) c.mask_tensor.data()[j] = j % 3 == 1;
            T* const entry = of_gradient ? &c.d_out.view()(0, at, 1, 2) : &c.q.view()(0, at, 1, 2);
            *entry = T(0);
            const auto saved = forward(policy, c);
            const auto d = backward(policy, c, saved);
            *entry = nan;
            const auto actual = forward(policy, c);
            const auto actual_d = backward(policy, c, actual);
            for (Index i = 0; i < 70; ++i)
                for (Index h = 0; h < 2; ++h) {
                    const bool reached = i == at && h == 1;
                    if (reached) CHECK(all_nan(&actual_d.d_q.const_view()(0, i, h, 0), 3));
                    if (reached && !of_gradient) CHECK(all_nan(&actual.out.const_view()(0, i, h, 0), 3));
                    if (reached) continue;
                    CHECK(same_bits(actual.out.view()[0][i][h], saved.out.view()[0][i][h]));
                    CHECK(same_bits(actual_d.d_q.view()[0][i][h], d.d_q.view()[0][i][h]));
                }
            for (Index r = 0; r < 2; ++r)
                for (Index j = 0; j < 300; ++j)
                    if (r == 1 && c.mask(0, r, j))
                        CHECK(all_nan(&actual_d.d_kv.const_view()(0, r, j, 0, 0, 0), 6));
                    else
                        CHECK(same_bits(actual_d.d_kv.view()[0][r][j], d.d_kv.view()[0][r][j]));
        }
    // A key that is the only one, or not: all queries of its route, and none of another.
    for (const bool only : {false, true})
        for (const Index part : {0, 1}) {
            Case<T> c(policy, {1, 2, 70, 300, 1, 3}, true, false);
            for (Index j = 0; j < 600; ++j) c.mask_tensor.data()[j] = only ? j % 300 == 4 : j % 3 == 1;
            c.kv.view()(0, 1, 4, 0, part, 1) = nan;
            const auto saved = forward(policy, c);
            const auto d = backward(policy, c, saved);
            for (Index i = 0; i < 70; ++i) {
                CHECK(all_nan(&saved.out.const_view()(0, i, 1, 0), 3));
                CHECK(std::isfinite(inner(saved.out.view()[0][i][0], saved.out.view()[0][i][0])));
                CHECK(std::isfinite(inner(d.d_q.view()[0][i][0], d.d_q.view()[0][i][0])));
            }
            CHECK(std::isfinite(inner(d.d_kv.view()[0][0], d.d_kv.view()[0][0])));
        }
}

TEST_CASE_TEMPLATE("dense_attention: the logit of the only key has no gradient", T, float, double) {
    const Cpu policy(1);
    for (const Index keys : {1, 5, 600})
        for (const bool scaled : {false, true}) {
            Case<T> c(policy, {1, 1, 70, keys, 2, 19}, true, scaled);
            for (Index j = 0; j < keys; ++j) c.mask_tensor.data()[j] = j == keys / 2;
            const auto d = backward(policy, c, forward(policy, c));
            for (Index i = 0; i < d.d_q.size(); ++i) CHECK(d.d_q.data()[i] == 0);
            for (Index j = 0; j < keys; ++j)
                for (Index h = 0; h < 2; ++h)
                    for (Index e = 0; e < 19; ++e) CHECK(d.d_kv.view()(0, 0, j, h, 0, e) == 0);
        }
}

TEST_CASE("dense_attention: the largest logit in any block of keys; logits as large as 1e5") {
    const Cpu policy(1);
    for (const Index at : {0, 255, 256, 700}) {
        Case<double> c(policy, {1, 1, 3, 701, 1, 2}, false, false);
        for (Index e = 0; e < 2; ++e) {
            c.kv.view()(0, 0, at, 0, 0, e) = 1e5;
            for (Index i = 0; i < 3; ++i) c.q.view()(0, i, 0, e) = 1;
        }
        const auto saved = forward(policy, c);
        const auto d = backward(policy, c, saved);
        for (Index i = 0; i < 3; ++i)
            for (Index e = 0; e < 2; ++e)
                CHECK(saved.out.view()(0, i, 0, e) == doctest::Approx(c.kv.view()(0, 0, at, 0, 1, e)).epsilon(1e-12));
        CHECK(std::isfinite(inner(d.d_kv, d.d_kv)));
        CHECK(std::isfinite(inner(d.d_q, d.d_q)));
    }
    Case<float> f(policy, {1, 1, 100, 600, 1, 2}, true, true);
    for (Index i = 0; i < f.q.size(); ++i) f.q.data()[i] *= 1e5f;
    const auto saved = forward(policy, f);
    const auto d = backward(policy, f, saved);
    CHECK(std::isfinite(inner(saved.out, saved.out)));
    CHECK(std::isfinite(inner(d.d_kv, d.d_kv)));
}

TEST_CASE("dense_attention: the same bits with 1 and 2 threads, run to run, and for each sequence alone") {
    const Cpu one(1), two(2);
    for (const Problem& p : {Problem{3, 2, 130, 300, 2, 5}, Problem{2, 1, 10, 20, 1, 3}}) {
        const Case<float> c(one, p, true, true);
        const auto saved = forward(one, c);
        const auto d = backward(one, c, saved);
        for (int run = 0; run < 2; ++run) {
            const auto pass2 = forward(two, c);
            const auto d2 = backward(two, c, pass2);
            CHECK(same_bits(pass2.out, saved.out));
            CHECK(same_bits(pass2.log_sum_exp, saved.log_sum_exp));
            CHECK(same_bits(d2.d_q, d.d_q));
            CHECK(same_bits(d2.d_kv, d.d_kv));
            CHECK(same_bits(d2.d_value_scale, d.d_value_scale));
        }
        for (Index b = 0; b < p.batch; ++b) {
            const auto q = sequence(c.q, b);
            const auto kv = sequence(c.kv, b);
            const auto mask = sequence(c.mask, b);
            const auto scale = sequence(c.scale, b);
            const auto alone = dense_attention_forward(two, q, kv, mask, scale);
            const auto d_alone = dense_attention_vjp(two, alone, sequence(c.d_out, b), q, kv, mask, scale);
            CHECK(same_bits(alone.out, sequence(saved.out, b)));
            CHECK(same_bits(d_alone.d_q, sequence(d.d_q, b)));
            CHECK(same_bits(d_alone.d_kv, sequence(d.d_kv, b)));
            CHECK(same_bits(d_alone.d_value_scale, sequence(d.d_value_scale, b)));
        }
    }
}

TEST_CASE("dense_attention: errors name the argument and both shapes") {
    const Cpu policy(1);
    const Case<float> c(policy, {2, 2, 3, 4, 1, 5}, true, true), wide(policy, {2, 2, 3, 4, 1, 6}, true, true);
    const Case<float> longer(policy, {2, 2, 4, 6, 1, 5}, true, true);
    const auto three_parts = normal<float>(policy, std::array<Index, 6>{2, 2, 4, 1, 3, 5}, 0);
    CHECK_THROWS_WITH_AS(dense_attention_forward(policy, wide.q, c.kv, {}, {}),
                         "colt5: `q` must have shape (2, any, 2, 5), but has (2, 3, 2, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(dense_attention_forward(policy, c.q, three_parts, {}, {}),
                         "colt5: `kv` must have shape (any, any, any, any, 2, any), but has (2, 2, 4, 1, 3, 5)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(dense_attention_forward(policy, c.q, c.kv, longer.mask, {}),
                         "colt5: `mask` must have shape (2, 2, 4), but has (2, 2, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(dense_attention_forward(policy, c.q, c.kv, c.mask, longer.scale),
                         "colt5: `value_scale` must have shape (2, 2, 4), but has (2, 2, 6)", ShapeError);
    const auto saved = forward(policy, c);
    CHECK_THROWS_WITH_AS(dense_attention_vjp(policy, saved, wide.d_out, c.q, c.kv, c.mask, c.scale),
                         "colt5: `d_out` must have shape (2, 3, 2, 5), but has (2, 3, 2, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(dense_attention_vjp(policy, saved, c.d_out, longer.q, c.kv, c.mask, c.scale),
                         "colt5: `q` must have shape (2, 3, 2, 5), but has (2, 4, 2, 5)", ShapeError);
}
