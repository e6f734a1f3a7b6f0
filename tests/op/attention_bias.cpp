// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <colt5/cpu/dense_attention.hpp>
#include <colt5/cpu/projected_local_attention.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

/// Local and dense attention with a relative position bias. Without one: local_attention.cpp and dense_attention.cpp.

namespace {

/// softmax of `logits`, over those that are not −∞, times the rows of `values`.
std::vector<double> weighted_sum(const std::vector<double>& logits, const std::vector<const double*>& values,
                                 Index dim) {
    const double largest = *std::max_element(logits.begin(), logits.end());
    std::vector<double> out(static_cast<std::size_t>(dim), 0.0);
    if (largest == -std::numeric_limits<double>::infinity()) return out;
    double sum = 0;
    for (const double s : logits) sum += std::exp(s - largest);
    for (std::size_t j = 0; j < logits.size(); ++j)
        for (std::size_t e = 0; e < out.size(); ++e) out[e] += std::exp(logits[j] - largest) / sum * values[j][e];
    return out;
}

double dot(const double* x, const double* y, Index dim) {
    double sum = 0;
    for (Index e = 0; e < dim; ++e) sum += x[e] * y[e];
    return sum / std::sqrt(static_cast<double>(dim));
}

constexpr double infinity = std::numeric_limits<double>::infinity();

template <typename T>
struct LocalCase {
    LocalCase(const Cpu& policy, Index batch, Index length, Index heads, Index dim, const RelativePositionBuckets& of,
              Index reach_, bool masked)
        : reach(reach_),
          buckets(of),
          q(normal<T>(policy, std::array{batch, length, heads, dim}, 20)),
          kv(normal<T>(policy, std::array{batch, length, Index{2}, heads, dim}, 21)),
          d_out(normal<T>(policy, q.shape(), 22)),
          table(normal<T>(policy, std::array{buckets.num_buckets, heads}, 23)) {
        if (!masked) return;
        mask_tensor = random_mask(policy, std::array{batch, length}, 24);
        for (Index i = length - length / 3; i < length; ++i) mask_tensor.view()(batch - 1, i) = false;
        mask = mask_tensor;
    }
    LocalAttentionActivations<T, Cpu> forward(const Cpu& policy) const {
        const auto by_distance = relative_position_bias(policy, buckets, table, reach);
        return local_attention_forward(policy, LocalAttention{reach, masked_rows}, q, kv, mask, 0, bias(by_distance));
    }
    template <typename ByDistance>
    RelativePositionBias<T> bias(const ByDistance& by_distance) const {
        return {buckets, by_distance.const_view()};
    }
    struct Gradients {
        HostTensor<T, 5> d_qkv;
        HostTensor<T, 2> d_table;
    };
    Gradients backward(const Cpu& policy) const {
        const auto by_distance = relative_position_bias(policy, buckets, table, reach);
        Gradients d{{}, filled<T>(policy, table.shape(), 0)};
        d.d_qkv = local_attention_vjp(policy, LocalAttention{reach, masked_rows}, forward(policy), d_out, q, kv, mask,
                                      bias(by_distance), d.d_table.view());
        return d;
    }
    Index reach;
    MaskedRows masked_rows = MaskedRows::zero;
    RelativePositionBuckets buckets;
    HostTensor<T, 4> q;
    HostTensor<T, 5> kv;
    HostTensor<T, 4> d_out;
    HostTensor<T, 2> table;
    MatrixTensor<bool, Cpu> mask_tensor;
    Mask mask;
};

HostTensor<double, 4> naive(const Cpu& policy, const LocalCase<double>& c) {
    auto out = filled<double>(policy, c.q.shape(), 0);
    const auto [batch, length, heads, dim] = out.shape();
    for (Index b = 0; b < batch; ++b)
        for (Index h = 0; h < heads; ++h)
            for (Index i = 0; i < length; ++i) {
                std::vector<double> logits;
                std::vector<const double*> values;
                for (Index j = 0; j < length; ++j) {
                    const bool seen = std::abs(i - j) <= c.reach && (!c.mask || c.mask(b, j));
                    logits.push_back(seen ? dot(&c.q.const_view()(b, i, h, 0), &c.kv.const_view()(b, j, 0, h, 0), dim) +
                                                c.table.const_view()(c.buckets.bucket(j - i), h)
                                          : -infinity);
                    values.push_back(&c.kv.const_view()(b, j, 1, h, 0));
                }
                const auto row = weighted_sum(logits, values, dim);
                std::copy(row.begin(), row.end(), &out.view()(b, i, h, 0));
            }
    return out;
}

struct LocalProblem {
    Index batch, length, heads, dim, reach;
    RelativePositionBuckets buckets;
};
// Lengths around tiles and segments, reaches below, at and above the length and max_distance, and more than one block
// of keys.
constexpr LocalProblem local_problems[] = {
    {1, 1, 1, 1, 1, {}},    {2, 5, 2, 3, 1, {}},        {2, 7, 1, 4, 7, {4, 2}},      {1, 9, 1, 5, 100, {}},
    {2, 64, 1, 8, 3, {}},   {1, 65, 2, 16, 64, {8, 9}}, {2, 63, 1, 7, 20, {16, 32}},  {1, 130, 1, 4, 13, {}},
    {1, 400, 2, 3, 99, {}}, {1, 600, 1, 3, 200, {}},    {1, 900, 1, 4, 300, {32, 40}}};

std::string describe(const LocalProblem& p) {
    return shape_string(std::array{p.batch, p.length, p.heads, p.dim}) + " reach " + std::to_string(p.reach);
}

}  // namespace

TEST_CASE("local_attention with a bias: agrees with a loop over all pairs, in double and float") {
    const Cpu policy(2);
    for (const LocalProblem& p : local_problems)
        for (const bool masked : {false, true}) {
            CAPTURE(describe(p));
            CAPTURE(masked);
            const LocalCase<double> c(policy, p.batch, p.length, p.heads, p.dim, p.buckets, p.reach, masked);
            const LocalCase<float> f(policy, p.batch, p.length, p.heads, p.dim, p.buckets, p.reach, masked);
            const auto expected = naive(policy, c);
            CHECK(relative_error(c.forward(policy).out, expected) <= 1e-13);
            CHECK(relative_error(f.forward(policy).out, expected) <= 2e-6);
        }
}

TEST_CASE("local_attention with a bias: the gradients are those of finite differences" * not_sanitized) {
    const Cpu policy(1);
    for (const LocalProblem& p : local_problems)
        for (const bool masked : {false, true})
            for (const MaskedRows masked_rows : {MaskedRows::zero, MaskedRows::window_mean}) {
                CAPTURE(describe(p));
                CAPTURE(masked);
                LocalCase<double> c(policy, p.batch, p.length, p.heads, p.dim, p.buckets, p.reach, masked);
                c.masked_rows = masked_rows;
                const auto d = c.backward(policy);
                const auto loss = [&] { return inner(c.d_out, c.forward(policy).out); };
                const auto part = [&](Index first, Index count) {
                    const Index row = p.heads * p.dim;
                    HostTensor<double, 2> of(policy, {p.batch * p.length, count * row});
                    for (Index i = 0; i < of.extent(0); ++i)
                        std::copy_n(d.d_qkv.data() + (3 * i + first) * row, count * row, of.data() + i * count * row);
                    return of;
                };
                if (p.length > 1) CHECK(directional_error(policy, c.q, part(0, 1), loss) <= 1e-7);
                CHECK(directional_error(policy, c.kv, part(1, 2), loss) <= 1e-7);
                if (p.length > 1)
                    CHECK(relative_error(d.d_table, finite_differences(policy, c.table, loss)) <= 1e-6);
                else
                    CHECK(inner(d.d_table, d.d_table) == 0);

                const LocalCase<float> f(policy, p.batch, p.length, p.heads, p.dim, p.buckets, p.reach, masked);
                if (p.length > 1 && masked_rows == MaskedRows::zero)
                    CHECK(relative_error(f.backward(policy).d_table, d.d_table) <= 1e-5);
            }
}

TEST_CASE("local_attention with a bias: a table of zeros changes no bit, threads and batches change no bit") {
    const Cpu policy(1);
    LocalCase<float> c(policy, 2, 700, 2, 9, {}, 50, true);
    const auto saved = c.forward(policy);
    const auto d = c.backward(policy);
    const auto d_threads = c.backward(Cpu(2));
    CHECK(same_bits(c.forward(Cpu(2)).out, saved.out));
    CHECK(same_bits(d_threads.d_qkv, d.d_qkv));
    CHECK(same_bits(d_threads.d_table, d.d_table));
    for (Index b = 0; b < 2; ++b) {
        LocalCase<float> alone(policy, 1, 700, 2, 9, {}, 50, false);
        alone.q = copy_of(policy, sequence(c.q, b));
        alone.kv = copy_of(policy, sequence(c.kv, b));
        alone.d_out = copy_of(policy, sequence(c.d_out, b));
        alone.mask = Mask(c.mask[b].data(), {1, 700});
        CHECK(same_bits(alone.forward(policy).out, sequence(saved.out, b)));
        CHECK(same_bits(alone.backward(policy).d_qkv, sequence(d.d_qkv, b)));
    }
    fill(policy, c.table, 0);
    const auto without = local_attention_forward(policy, LocalAttention{50}, c.q, c.kv, c.mask);
    CHECK(same_bits(c.forward(policy).out, without.out));
    CHECK(same_bits(c.backward(policy).d_qkv,
                    local_attention_vjp(policy, LocalAttention{50}, without, c.d_out, c.q, c.kv, c.mask)));
}

TEST_CASE("local_attention with a bias: chunks and recomputation give the same gradients") {
    const Cpu policy(2);
    const LocalCase<double> c(policy, 1, 200, 2, 3, {8, 5}, 9, true);
    const LocalAttention attention{9};
    const auto by_distance = relative_position_bias(policy, c.buckets, c.table, c.reach);
    const auto whole = c.backward(policy);
    const auto out = c.forward(policy).out;
    // y = out · weightᵀ with the identity as weight: d_y is d_out.
    MatrixTensor<double, Cpu> weight(policy, {6, 6});
    for (Index i = 0; i < 36; ++i) weight.data()[i] = i % 7 == 0;
    for (const bool recompute : {false, true}) {
        auto d_table = filled<double>(policy, c.table.shape(), 0);
        auto d_weight = filled<double>(policy, weight.shape(), 0);
        auto d_qkv = filled<double>(policy, whole.d_qkv.shape(), 0);
        Index carried_until = 0;
        for (const Index first : {0, 70, 150}) {
            const Index m = (first == 0 ? 70 : first == 70 ? 150 : 200) - first;
            const View<const double, dynamic, dynamic, dynamic, dynamic> q(&c.q.const_view()(0, first, 0, 0),
                                                                           {1, m, 2, 3});
            const View<const double, dynamic, dynamic, dynamic, dynamic> d_out(&c.d_out.const_view()(0, first, 0, 0),
                                                                               {1, m, 2, 3});
            const Index begin = attention.window_begin(first), window = attention.window(first, m, 200);
            const View<double, dynamic, dynamic, dynamic, dynamic, dynamic> d_window(&d_qkv.view()(0, begin, 0, 0, 0),
                                                                                     {1, window, 3, 2, 3});
            const Index carried = std::max(Index{0}, carried_until - begin);
            const auto bias = c.bias(by_distance);
            const auto saved = local_attention_forward(policy, attention, q, c.kv, c.mask, first, bias);
            for (Index i = 0; i < m * 6; ++i) CHECK(saved.out.data()[i] == out.data()[first * 6 + i]);
            if (recompute)
                projected_local_attention_vjp(policy, d_window, attention,
                                              TokensView<const double>(d_out.data(), {1, m, 6}), q, c.kv, c.mask, first,
                                              carried, weight, d_weight.view(), bias, d_table.view());
            else
                local_attention_vjp(policy, d_window, attention, saved, d_out, q, c.kv, c.mask, first, carried, bias,
                                    d_table.view());
            carried_until = begin + window;
        }
        CHECK(relative_error(d_qkv, whole.d_qkv) <= 1e-13);
        CHECK(relative_error(d_table, whole.d_table) <= 1e-13);
    }
}

TEST_CASE("local_attention with a bias: what is not finite reaches what sees it, and padding nothing") {
    const Cpu policy(1);
    for (const double value : {infinity, std::numeric_limits<double>::quiet_NaN()}) {
        LocalCase<double> c(policy, 1, 100, 1, 4, {}, 6, true);
        const auto clean = c.forward(policy);
        const auto d_clean = c.backward(policy);
        c.mask_tensor.view()(0, 40) = false;
        LocalCase<double> dirty(policy, 1, 100, 1, 4, {}, 6, true);
        dirty.mask_tensor.view()(0, 40) = false;
        for (Index e = 0; e < 4; ++e) dirty.kv.view()(0, 40, 0, 0, e) = dirty.kv.view()(0, 40, 1, 0, e) = value;
        CHECK(same_bits(dirty.forward(policy).out, c.forward(policy).out));
        CHECK(same_bits(dirty.backward(policy).d_table, c.backward(policy).d_table));
        dirty.mask_tensor.view()(0, 40) = true;
        const auto reached = dirty.forward(policy);
        for (Index i = 0; i < 100; ++i) CHECK(std::isnan(reached.out.data()[4 * i]) == (std::abs(i - 40) <= 6));
        for (Index r = -6; r <= 6; ++r)
            CHECK(std::isnan(dirty.backward(policy).d_table.view()(c.buckets.bucket(r), 0)));
        for (Index i = 0; i < 32; ++i) CHECK(std::isfinite(d_clean.d_table.data()[i]));
        for (Index i = 0; i < 400; ++i) CHECK(std::isfinite(clean.out.data()[i]));
    }
}

TEST_CASE("local_attention with a bias: errors name the argument and both shapes") {
    const Cpu policy(1);
    const LocalCase<double> c(policy, 1, 9, 2, 3, {}, 2, false);
    const auto of_three = relative_position_bias(policy, RelativePositionBuckets{},
                                                 normal<double>(policy, std::array<Index, 2>{32, 3}, 1), 2);
    const RelativePositionBias<double> bias{{}, of_three.const_view()};
    CHECK_THROWS_WITH_AS(local_attention(policy, LocalAttention{2}, c.q, c.kv, {}, 0, bias),
                         "colt5: `bias` must have shape (2, any), but has (3, 5)", ShapeError);
    const auto good = relative_position_bias(policy, c.buckets, c.table, 2);
    auto d_table = filled<double>(policy, std::array<Index, 2>{16, 2}, 0);
    CHECK_THROWS_WITH_AS(local_attention_vjp(policy, LocalAttention{2}, c.forward(policy), c.d_out, c.q, c.kv, {},
                                             c.bias(good), d_table.view()),
                         "colt5: `d_table` must have shape (32, 2), but has (16, 2)", ShapeError);
}

namespace {

template <typename T>
struct DenseCase {
    DenseCase(const Cpu& policy, Index batch, Index routes, Index queries, Index keys, Index per_route, Index dim,
              const RelativePositionBuckets& of, bool all)
        : buckets(of),
          q(normal<T>(policy, std::array{batch, queries, routes * per_route, dim}, 30)),
          kv(normal<T>(policy, std::array{batch, routes, keys, per_route, Index{2}, dim}, 31)),
          value_scale(normal<T>(policy, std::array{batch, routes, keys}, 32)),
          d_out(normal<T>(policy, q.shape(), 33)),
          table(normal<T>(policy, std::array{buckets.num_buckets, routes * per_route}, 34)),
          mask_tensor(random_mask(policy, value_scale.shape(), 35)),
          query_routes(all && (routes * per_route) % 3 == 0 ? 3
                       : all && per_route % 2 == 0          ? 2
                                                            : 1),
          query_positions(policy, {batch, query_routes, queries}),
          null_keys(all && keys > 2 ? 2 : 0),
          key_positions(policy, {batch, routes, keys - null_keys}) {
        // Positions anywhere in a sequence of 300.
        const Random random(Seed{3});
        fill_with(policy, query_positions, [&](std::size_t i) { return std::floor(300 * random.uniform(i)); });
        fill_with(policy, key_positions, [&](std::size_t i) { return std::floor(300 * random.uniform(20000 + i)); });
        if (!all) return;
        scale = value_scale.const_view();
        mask = mask_tensor.const_view();
        positions = {query_positions.const_view(), key_positions.const_view()};
    }
    RoutedPositionBias<T> bias(const Cpu& policy) {
        by_distance = relative_position_bias(policy, buckets, table, buckets.max_distance);
        return {{buckets, by_distance.const_view()}, positions.queries, positions.keys, null_keys};
    }
    DenseAttentionActivations<T, Cpu> forward(const Cpu& policy) {
        return dense_attention_forward(policy, q, kv, mask, scale, bias(policy));
    }
    RelativePositionBuckets buckets;
    HostTensor<T, 4> q;
    HostTensor<T, 6> kv;
    TokensTensor<T, Cpu> value_scale;
    HostTensor<T, 4> d_out;
    HostTensor<T, 2> table, by_distance;
    TokensTensor<bool, Cpu> mask_tensor;
    Index query_routes;
    TokensTensor<TokenIndex, Cpu> query_positions;
    Index null_keys;
    TokensTensor<TokenIndex, Cpu> key_positions;
    TokensView<const T> scale;
    KeyMask mask;
    struct {
        TokensView<const TokenIndex> queries, keys;
    } positions;
};

HostTensor<double, 4> naive(const Cpu& policy, const DenseCase<double>& c) {
    auto out = filled<double>(policy, c.q.shape(), 0);
    const auto [batch, queries, heads, dim] = out.shape();
    const Index keys = c.kv.extent(2), per_route = c.kv.extent(3);
    for (Index b = 0; b < batch; ++b)
        for (Index h = 0; h < heads; ++h)
            for (Index i = 0; i < queries; ++i) {
                const Index r = h / per_route, in_route = h % per_route;
                const Index query = c.positions.queries ? c.positions.queries(b, h * c.query_routes / heads, i) : i;
                std::vector<double> logits;
                std::vector<std::vector<double>> scaled;
                std::vector<const double*> values;
                for (Index j = 0; j < keys; ++j) {
                    const Index with_position = j - c.null_keys;
                    const Index key = with_position < 0  ? -1
                                      : c.positions.keys ? c.positions.keys(b, r, with_position)
                                                         : with_position;
                    const double* const k = &c.kv.const_view()(b, r, j, in_route, 0, 0);
                    const double bias = key < 0 ? 0 : c.table.const_view()(c.buckets.bucket(key - query), h);
                    logits.push_back(c.mask && !c.mask(b, r, j) ? -infinity
                                                                : dot(&c.q.const_view()(b, i, h, 0), k, dim) + bias);
                    scaled.emplace_back(k + dim, k + 2 * dim);
                    for (double& v : scaled.back()) v *= c.scale ? c.scale(b, r, j) : 1;
                }
                for (const auto& row : scaled) values.push_back(row.data());
                const auto row = weighted_sum(logits, values, dim);
                std::copy(row.begin(), row.end(), &out.view()(b, i, h, 0));
            }
    return out;
}

struct DenseProblem {
    Index batch, routes, queries, keys, heads_per_route, dim;
    RelativePositionBuckets buckets;
};
constexpr DenseProblem dense_problems[] = {{1, 1, 1, 1, 1, 1, {}},     {2, 1, 3, 5, 2, 3, {}},
                                           {2, 2, 7, 4, 3, 4, {4, 2}}, {1, 1, 64, 8, 1, 8, {8, 20}},
                                           {1, 2, 65, 257, 1, 4, {}},  {1, 1, 130, 600, 1, 3, {16, 64}}};

}  // namespace

TEST_CASE("dense_attention with a bias: agrees with a loop over all pairs, in double and float") {
    const Cpu policy(2);
    for (const DenseProblem& p : dense_problems)
        for (const bool all : {false, true}) {
            CAPTURE(shape_string(std::array{p.batch, p.routes, p.queries, p.keys, p.heads_per_route, p.dim}));
            CAPTURE(all);
            DenseCase<double> c(policy, p.batch, p.routes, p.queries, p.keys, p.heads_per_route, p.dim, p.buckets, all);
            DenseCase<float> f(policy, p.batch, p.routes, p.queries, p.keys, p.heads_per_route, p.dim, p.buckets, all);
            const auto expected = naive(policy, c);
            CHECK(relative_error(c.forward(policy).out, expected) <= 1e-13);
            CHECK(relative_error(f.forward(policy).out, expected) <= 2e-6);
        }
}

TEST_CASE("dense_attention with a bias: the gradients are those of finite differences, the same on each run") {
    const Cpu policy(1);
    for (const DenseProblem& p : dense_problems)
        for (const bool all : {false, true}) {
            CAPTURE(shape_string(std::array{p.batch, p.routes, p.queries, p.keys, p.heads_per_route, p.dim}));
            CAPTURE(all);
            DenseCase<double> c(policy, p.batch, p.routes, p.queries, p.keys, p.heads_per_route, p.dim, p.buckets, all);
            const auto backward = [&](auto& of, const Cpu& with, auto& d_table) {
                const auto saved = of.forward(with);
                return dense_attention_vjp(with, saved, of.d_out, of.q, of.kv, of.mask, of.scale, of.bias(with),
                                           d_table.view());
            };
            auto d_table = filled<double>(policy, c.table.shape(), 0), again = copy_of(policy, d_table);
            const auto d = backward(c, policy, d_table);
            const auto d_again = backward(c, Cpu(2), again);
            CHECK(same_bits(again, d_table));
            CHECK(same_bits(d_again.d_kv, d.d_kv));
            const auto loss = [&] { return inner(c.d_out, c.forward(policy).out); };
            if (p.keys == 1) {
                CHECK(inner(d_table, d_table) == 0);
                continue;
            }
            CHECK(relative_error(d_table, finite_differences(policy, c.table, loss)) <= 1e-6);
            CHECK(directional_error(policy, c.q, d.d_q, loss) <= 1e-7);
            CHECK(directional_error(policy, c.kv, d.d_kv, loss) <= 1e-7);
            if (all) CHECK(directional_error(policy, c.value_scale, d.d_value_scale, loss) <= 1e-7);

            DenseCase<float> f(policy, p.batch, p.routes, p.queries, p.keys, p.heads_per_route, p.dim, p.buckets, all);
            auto d_table_float = filled<float>(policy, f.table.shape(), 0);
            backward(f, policy, d_table_float);
            CHECK(relative_error(d_table_float, d_table) <= 1e-5);
        }
}

TEST_CASE("dense_attention with a bias: a table of zeros changes no bit; errors name the argument") {
    const Cpu policy(1);
    DenseCase<float> c(policy, 2, 2, 70, 300, 1, 8, {}, true);
    fill(policy, c.table, 0);
    const auto saved = dense_attention_forward(policy, c.q, c.kv, c.mask, c.scale);
    CHECK(same_bits(c.forward(policy).out, saved.out));
    auto d_table = filled<float>(policy, c.table.shape(), 0);
    const auto d =
        dense_attention_vjp(policy, saved, c.d_out, c.q, c.kv, c.mask, c.scale, c.bias(policy), d_table.view());
    const auto without = dense_attention_vjp(policy, saved, c.d_out, c.q, c.kv, c.mask, c.scale);
    CHECK(same_bits(d.d_q, without.d_q));
    CHECK(same_bits(d.d_kv, without.d_kv));
    CHECK(same_bits(d.d_value_scale, without.d_value_scale));

    auto bias = c.bias(policy);
    bias.query_positions = TokensView<const TokenIndex>(c.query_positions.data(), {1, 1, 70});
    CHECK_THROWS_WITH_AS(dense_attention_forward(policy, c.q, c.kv, c.mask, c.scale, bias),
                         "colt5: `query_positions` must have shape (2, any, 70), but has (1, 1, 70)", ShapeError);
    HostTensor<TokenIndex, 3> of_three_routes(policy, {2, 3, 70});
    bias.query_positions = of_three_routes.const_view();
    CHECK_THROWS_WITH_AS(dense_attention_forward(policy, c.q, c.kv, c.mask, c.scale, bias),
                         "colt5: `routes of query_positions` must be a divisor of 2 heads, but is 3", ValueError);
    bias = c.bias(policy);
    bias.key_positions = TokensView<const TokenIndex>(c.key_positions.data(), {2, 2, 30});
    CHECK_THROWS_WITH_AS(dense_attention_forward(policy, c.q, c.kv, c.mask, c.scale, bias),
                         "colt5: `key_positions` must have shape (2, 2, 298), but has (2, 2, 30)", ShapeError);
    bias.null_keys = 301;
    CHECK_THROWS_WITH_AS(dense_attention_forward(policy, c.q, c.kv, c.mask, c.scale, bias),
                         "colt5: `null_keys` must be in [0, 300], the keys of kv, but is 301", ValueError);
}
