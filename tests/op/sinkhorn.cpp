// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <set>
#include <vector>

#include <colt5/cpu/sinkhorn.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

template <typename T>
struct Case {
    Case(const Cpu& policy, Index batch, Index routes, Index length, Index slots, bool masked, bool noisy)
        : k(std::min(slots, length)),
          logits(normal<T>(policy, std::array{batch, routes, length}, 50)),
          d_scores(normal<T>(policy, std::array{batch, routes, k}, 51)) {
        if (masked) {
            mask_tensor = random_mask(policy, std::array{batch, length}, 52);
            if (batch > 1) std::fill_n(mask_tensor.data() + length, length, false);  // a sequence of padding only
            mask = mask_tensor;
        }
        if (noisy) {
            noise_tensor = gumbel_noise<T>(policy, Random(Seed{3}), batch * routes, k, length);
            noise = noise_tensor.const_view();
        }
    }
    Index k;
    TokensTensor<T, Cpu> logits, d_scores;
    MatrixTensor<bool, Cpu> mask_tensor;
    Mask mask;
    TokensTensor<T, Cpu> noise_tensor;
    TokensView<const T> noise;
};

template <typename T>
auto forward(const Cpu& policy, const Sinkhorn& sinkhorn, const Case<T>& c, Index slots) {
    return sinkhorn_forward(policy, sinkhorn, c.logits, c.noise, c.mask, slots);
}
template <typename T>
auto backward(const Cpu& policy, const Sinkhorn& sinkhorn, const Case<T>& c, const SinkhornActivations<T, Cpu>& saved) {
    return sinkhorn_vjp(policy, sinkhorn, saved, c.d_scores, saved.indices, c.logits, c.noise, c.mask);
}

/// The reference's matrix (slots, tokens) of one row: normalized over tokens, then over slots, time and again.
/// Tokens that take no part are left out of it.
std::vector<std::vector<double>> naive_transport(const Sinkhorn& sinkhorn, const Case<double>& c, Index b, Index r) {
    const Index length = c.logits.extent(2), row = b * c.logits.extent(1) + r;
    const auto takes_part = [&](Index j) { return !c.mask || c.mask(b, j) || sinkhorn.masked_tokens_take_part; };
    Index real = 0;
    for (Index j = 0; j < length; ++j) real += !c.mask || c.mask(b, j) ? 1 : 0;
    const Index slots = real == 0 ? 0 : sinkhorn.masked_tokens_take_part ? c.k : std::min(c.k, real);
    std::vector<std::vector<double>> z(static_cast<std::size_t>(slots));
    for (Index i = 0; i < slots; ++i)
        for (Index j = 0; j < length; ++j) {
            const double s = !c.mask || c.mask(b, j) ? std::max(c.logits.view()(b, r, j), 1e-20) : 1e-20;
            const double value = (std::log(s) + (c.noise ? c.noise(row, i, j) : 0)) / sinkhorn.temperature;
            z[static_cast<std::size_t>(i)].push_back(takes_part(j) ? value : -1e300);
        }
    const auto log_sum_exp = [](const std::vector<double>& x) {
        double largest = -1e300, sum = 0;
        for (const double value : x) largest = std::max(largest, value);
        for (const double value : x) sum += value > -1e299 ? std::exp(value - largest) : 0;
        return largest + std::log(sum);
    };
    for (int t = 0; t < sinkhorn.n_iters; ++t) {
        for (auto& slot : z) {
            const double sum = log_sum_exp(slot);
            for (double& value : slot) value = value > -1e299 ? value - sum : value;
        }
        for (Index j = 0; j < length; ++j) {
            if (!takes_part(j)) continue;
            std::vector<double> column;
            for (const auto& slot : z) column.push_back(slot[static_cast<std::size_t>(j)]);
            const double sum = log_sum_exp(column);
            for (auto& slot : z) slot[static_cast<std::size_t>(j)] -= sum;
        }
    }
    for (auto& slot : z)
        for (double& value : slot) value = value > -1e299 ? std::exp(value) : 0;
    return z;
}

/// Σ d_scores · P at the indices: what the gradient differentiates.
double naive_loss(const Sinkhorn& sinkhorn, const Case<double>& c, const TokensTensor<TokenIndex, Cpu>& indices) {
    double loss = 0;
    for (Index b = 0; b < c.logits.extent(0); ++b)
        for (Index r = 0; r < c.logits.extent(1); ++r) {
            const auto p = naive_transport(sinkhorn, c, b, r);
            for (std::size_t i = 0; i < p.size(); ++i) {
                const auto slot = static_cast<Index>(i);
                loss += c.d_scores.view()(b, r, slot) * p[i][static_cast<std::size_t>(indices.view()(b, r, slot))];
            }
        }
    return loss;
}

constexpr std::array<std::array<Index, 4>, 7> shapes{
    // batch, routes, length, slots
    {{1, 1, 1, 1}, {2, 2, 9, 4}, {2, 1, 17, 17}, {1, 2, 5, 100}, {2, 1, 600, 7}, {0, 1, 5, 2}, {2, 1, 0, 2}}};
const std::vector<Sinkhorn> variants{
    {}, {.n_iters = 1, .temperature = 1}, {.n_iters = 3, .temperature = 2, .masked_tokens_take_part = true}};

}  // namespace

TEST_CASE("sinkhorn: choices and scores agree with normalizing the matrix") {
    const Cpu policy(2);
    for (const auto& shape : shapes)
        for (const Sinkhorn& sinkhorn : variants)
            for (const bool masked : {false, true})
                for (const bool noisy : {false, true}) {
                    CAPTURE(shape_string(shape));
                    CAPTURE(sinkhorn.n_iters);
                    CAPTURE(masked);
                    CAPTURE(noisy);
                    const auto [batch, routes, length, slots] = shape;
                    const Case<double> c(policy, batch, routes, length, slots, masked, noisy);
                    const auto saved = forward(policy, sinkhorn, c, slots);
                    REQUIRE(saved.indices.shape() == std::array{batch, routes, c.k});
                    for (Index b = 0; b < batch; ++b)
                        for (Index r = 0; r < routes; ++r) {
                            const auto p = naive_transport(sinkhorn, c, b, r);
                            for (Index i = 0; i < c.k; ++i) {
                                const Index choice = saved.indices.view()(b, r, i);
                                const double score = saved.scores.view()(b, r, i);
                                if (i >= static_cast<Index>(p.size())) {  // left over: a masked token
                                    CHECK(!c.mask(b, choice));
                                    CHECK(score == 0);
                                    continue;
                                }
                                const auto& slot = p[static_cast<std::size_t>(i)];
                                double best = 0;
                                for (Index j = 0; j < length; ++j)
                                    if (!c.mask || c.mask(b, j))
                                        best = std::max(best, slot[static_cast<std::size_t>(j)]);
                                CHECK((!c.mask || c.mask(b, choice)));
                                CHECK(slot[static_cast<std::size_t>(choice)] == doctest::Approx(best).epsilon(1e-12));
                                CHECK(score == doctest::Approx(best).epsilon(1e-12));
                            }
                        }
                    const Case<float> f(policy, batch, routes, length, slots, masked, noisy);
                    CHECK(relative_error(forward(policy, sinkhorn, f, slots).scores, saved.scores) <= 1e-5);
                }
}

TEST_CASE("sinkhorn: the gradient is that of finite differences") {
    const Cpu policy(1);
    for (const auto& shape : shapes)
        for (const Sinkhorn& sinkhorn : variants)
            for (const bool masked : {false, true})
                for (const bool noisy : {false, true}) {
                    CAPTURE(shape_string(shape));
                    CAPTURE(sinkhorn.n_iters);
                    CAPTURE(masked);
                    CAPTURE(noisy);
                    const auto [batch, routes, length, slots] = shape;
                    if (length > 100) continue;
                    Case<double> c(policy, batch, routes, length, slots, masked, noisy);
                    const auto saved = forward(policy, sinkhorn, c, slots);
                    const auto d_logits = backward(policy, sinkhorn, c, saved);
                    const auto loss = [&] { return naive_loss(sinkhorn, c, saved.indices); };
                    const auto expected = finite_differences(policy, c.logits, loss, 3e-5);
                    if (inner(expected, expected) > 1e-12)
                        CHECK(relative_error(d_logits, expected) <= 1e-6);
                    else
                        CHECK(inner(d_logits, d_logits) <= 1e-12);
                    // The last normalization cancels most of a logit's effect, and that magnifies the rounding of the
                    // logits.
                    const Case<float> f(policy, batch, routes, length, slots, masked, noisy);
                    const auto pass_f = forward(policy, sinkhorn, f, slots);
                    if (inner(expected, expected) > 1e-12)
                        CHECK(relative_error(backward(policy, sinkhorn, f, pass_f), d_logits) <= 1e-4);
                }
}

TEST_CASE("sinkhorn: without noise all slots agree; ties go to the lower index") {
    const Cpu policy(1);
    const std::vector<double> values{1, 3, 2, 3, -1};
    const auto logits = from_host<TokensTensor<double, Cpu>>(policy, {1, 1, 5}, values);
    const auto saved = sinkhorn_forward(policy, Sinkhorn{.n_iters = 1}, logits, {}, {}, 3);
    for (const double score : to_host(policy, saved.scores)) CHECK(score == doctest::Approx(1.0 / 3));
    const auto ones = filled<double>(policy, std::array<Index, 3>{1, 1, 5}, 1);
    const auto tied = sinkhorn_forward(policy, Sinkhorn{}, ones, {}, {}, 3);
    CHECK(to_host(policy, tied.indices) == std::vector<TokenIndex>{0, 0, 0});
}

TEST_CASE("sinkhorn: what masked tokens hold changes nothing, and they have no gradient") {
    const Cpu policy(1);
    for (const Sinkhorn& sinkhorn : variants) {
        Case<double> c(policy, 3, 1, 20, 6, true, true);
        const auto saved = forward(policy, sinkhorn, c, 6);
        const auto d_logits = backward(policy, sinkhorn, c, saved);
        for (Index i = 0; i < 60; ++i)
            if (!c.mask.data()[i]) {
                CHECK(d_logits.data()[i] == 0);
                c.logits.data()[i] = i % 2 == 0 ? std::numeric_limits<double>::quiet_NaN() : 1e30;
            }
        const auto other = forward(policy, sinkhorn, c, 6);
        CHECK(same_bits(other.indices, saved.indices));
        CHECK(same_bits(other.scores, saved.scores));
        CHECK(same_bits(backward(policy, sinkhorn, c, other), d_logits));
    }
}

TEST_CASE_TEMPLATE("sinkhorn: a NaN among the real logits makes its row NaN, wherever it stands", T, float, double) {
    const Cpu policy(2);
    for (const Sinkhorn& sinkhorn : variants)
        for (const bool masked : {false, true})
            for (const Index place : {0, 1, 20, 39}) {
                CAPTURE(sinkhorn.n_iters);
                CAPTURE(masked);
                CAPTURE(place);
                Case<T> c(policy, 1, 2, 40, 9, masked, true);
                if (masked) c.mask_tensor.data()[place] = true;
                c.logits.view()(0, 1, place) = std::numeric_limits<T>::quiet_NaN();
                const auto saved = forward(policy, sinkhorn, c, 9);
                const auto d_logits = backward(policy, sinkhorn, c, saved);
                const auto real = [&](Index i) { return !c.mask || c.mask(0, i); };
                for (Index i = 0; i < 9; ++i) {
                    CHECK(std::isnan(saved.scores.view()(0, 1, i)));
                    CHECK(real(saved.indices.view()(0, 1, i)));
                    CHECK(std::isfinite(saved.scores.view()(0, 0, i)));
                }
                for (Index j = 0; j < 40; ++j) {
                    const T d = d_logits.view()(0, 1, j);
                    CHECK((real(j) ? std::isnan(d) : d == 0));
                    CHECK(std::isfinite(d_logits.view()(0, 0, j)));
                }
            }
}

TEST_CASE("sinkhorn: infinite logits count as the largest number and as nothing") {
    const Cpu policy(1);
    constexpr double infinity = std::numeric_limits<double>::infinity();
    Case<double> c(policy, 1, 1, 20, 6, false, true), finite(policy, 1, 1, 20, 6, false, true);
    c.logits.data()[3] = infinity;
    finite.logits.data()[3] = std::numeric_limits<double>::max();
    c.logits.data()[7] = -infinity;
    finite.logits.data()[7] = -1;
    const auto saved = forward(policy, Sinkhorn{}, c, 6), expected = forward(policy, Sinkhorn{}, finite, 6);
    CHECK(same_bits(saved.indices, expected.indices));
    CHECK(same_bits(saved.scores, expected.scores));
    const auto d_logits = backward(policy, Sinkhorn{}, c, saved);
    for (const double d : to_host(policy, d_logits)) CHECK(std::isfinite(d));
    CHECK(d_logits.data()[3] == 0);
    CHECK(d_logits.data()[7] == 0);
}

TEST_CASE("sinkhorn: logits at the floor have a gradient, those below it have none") {
    const Cpu policy(1);
    // What counts is the ratio of logits: with all of them 1e20 times as large, none but the first is at the floor.
    const std::vector<double> at_floor{1e-20, 0.25e-20, 3e-20, std::nextafter(1e-20, 0.0), 2e-20}, above{1, 1, 3, 1, 2};
    Case<double> c(policy, 1, 1, 5, 3, false, true), expected(policy, 1, 1, 5, 3, false, true);
    for (Index j = 0; j < 5; ++j) {
        c.logits.data()[j] = at_floor[static_cast<std::size_t>(j)];
        expected.logits.data()[j] = above[static_cast<std::size_t>(j)];
    }
    for (const Sinkhorn& sinkhorn : variants) {
        const auto saved = forward(policy, sinkhorn, c, 3), expected_saved = forward(policy, sinkhorn, expected, 3);
        CHECK(same_bits(saved.indices, expected_saved.indices));
        const auto d = backward(policy, sinkhorn, c, saved),
                   large = backward(policy, sinkhorn, expected, expected_saved);
        REQUIRE(std::abs(large.data()[0]) > 1e-4);
        for (const Index j : {0, 2, 4}) CHECK(d.data()[j] * 1e-20 == doctest::Approx(large.data()[j]).epsilon(1e-10));
        for (const Index j : {1, 3}) CHECK(d.data()[j] == 0);
    }
}

TEST_CASE("sinkhorn: padding changes no choice and no score") {
    const Cpu policy(1);
    const auto noise = gumbel_noise<double>(policy, Random(Seed{3}), 1, 4, 9);
    const auto padded_noise = gumbel_noise<double>(policy, Random(Seed{3}), 1, 6, 30);
    for (Index i = 0; i < 4; ++i)
        for (Index j = 0; j < 9; ++j) CHECK(noise.view()(0, i, j) == padded_noise.view()(0, i, j));

    const auto padded = normal<double>(policy, std::array<Index, 3>{1, 1, 30}, 0);
    HostTensor<bool, 2> mask(policy, {1, 30});
    fill_with(policy, mask, [](std::size_t j) { return j < 9; });
    const auto logits = from_host<TokensTensor<double, Cpu>>(policy, {1, 1, 9}, std::span(padded.data(), 9));
    for (const Index slots : {4, 6, 20}) {  // 20: more than there are tokens
        const Index k = std::min(slots, Index{9}), padded_k = std::min(slots, Index{30});
        const auto short_noise = gumbel_noise<double>(policy, Random(Seed{3}), 1, k, 9);
        const auto long_noise = gumbel_noise<double>(policy, Random(Seed{3}), 1, padded_k, 30);
        const auto expected = sinkhorn_forward(policy, Sinkhorn{}, logits, short_noise.const_view(), {}, slots);
        const auto actual = sinkhorn_forward(policy, Sinkhorn{}, padded, long_noise.const_view(), Mask(mask), slots);
        for (Index i = 0; i < k; ++i) {
            CHECK(actual.indices.view()(0, 0, i) == expected.indices.view()(0, 0, i));
            CHECK(actual.scores.view()(0, 0, i) == doctest::Approx(expected.scores.view()(0, 0, i)).epsilon(1e-12));
        }
        for (Index i = k; i < padded_k; ++i) CHECK(actual.scores.view()(0, 0, i) == 0);
    }
}

TEST_CASE("sinkhorn: the same bits with 1 and 2 threads, and for each sequence alone") {
    const Cpu one(1), two(2);
    const Case<float> c(one, 3, 2, 700, 20, true, true);
    const auto saved = forward(one, Sinkhorn{}, c, 20);
    const auto d_logits = backward(one, Sinkhorn{}, c, saved);
    const auto pass2 = forward(two, Sinkhorn{}, c, 20);
    CHECK(same_bits(pass2.indices, saved.indices));
    CHECK(same_bits(pass2.scores, saved.scores));
    CHECK(same_bits(backward(two, Sinkhorn{}, c, pass2), d_logits));
    for (Index b = 0; b < 3; ++b) {
        const auto logits = sequence(c.logits, b);
        const auto mask = sequence(c.mask, b);
        const TokensView<const float> noise(c.noise[2 * b].data(), {2, 20, 700});
        const auto alone = sinkhorn_forward(two, Sinkhorn{}, logits, noise, mask, 20);
        CHECK(same_bits(alone.indices, sequence(saved.indices, b)));
        CHECK(same_bits(alone.scores, sequence(saved.scores, b)));
        CHECK(
            same_bits(sinkhorn_vjp(two, Sinkhorn{}, alone, sequence(c.d_scores, b), alone.indices, logits, noise, mask),
                      sequence(d_logits, b)));
    }
}

TEST_CASE("sinkhorn: errors name the argument") {
    const Cpu policy(1);
    const Case<float> c(policy, 2, 1, 5, 3, false, true), wide(policy, 2, 1, 6, 3, true, true);
    const auto pass_of = [&](const Sinkhorn& sinkhorn, TokensView<const float> noise, Mask mask, Index slots) {
        return sinkhorn_forward(policy, sinkhorn, c.logits, noise, mask, slots);
    };
    CHECK_THROWS_WITH_AS(pass_of({.n_iters = 0}, {}, {}, 3), "colt5: `n_iters` must be >= 1, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(pass_of({.temperature = 0}, {}, {}, 3), "colt5: `temperature` must be > 0, but is 0",
                         ValueError);
    CHECK_THROWS_WITH_AS(pass_of({.temperature = 1e-30}, {}, {}, 3),
                         "colt5: `temperature` must be in [1e-6, 1e6], but is 1e-30", ValueError);
    CHECK_THROWS_WITH_AS(pass_of({.temperature = std::numeric_limits<double>::infinity()}, {}, {}, 3),
                         "colt5: `temperature` must be in [1e-6, 1e6], but is inf", ValueError);
    for (const double temperature : {smallest_divisor, largest_divisor})
        for (const bool masked : {false, true}) {
            const Case<float> extreme(policy, 2, 1, 50, 9, masked, true);
            const auto saved = forward(policy, Sinkhorn{.temperature = temperature}, extreme, 9);
            for (const float score : to_host(policy, saved.scores)) CHECK(std::isfinite(score));
            const auto d = backward(policy, Sinkhorn{.temperature = temperature}, extreme, saved);
            for (const float value : to_host(policy, d)) CHECK_FALSE(std::isnan(value));
        }
    CHECK_THROWS_WITH_AS(pass_of({}, {}, {}, 0), "colt5: `slots` must be >= 1, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(pass_of({}, wide.noise, {}, 3), "colt5: `noise` must have shape (2, 3, 5), but has (2, 3, 6)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(pass_of({}, {}, wide.mask, 3), "colt5: `mask` must have shape (2, 5), but has (2, 6)",
                         ShapeError);
    const auto saved = forward(policy, Sinkhorn{}, c, 3);
    CHECK_THROWS_WITH_AS(sinkhorn_vjp(policy, Sinkhorn{}, saved, c.logits, saved.indices, c.logits, c.noise, c.mask),
                         "colt5: `d_scores` must have shape (2, 1, 3), but has (2, 1, 5)", ShapeError);
    CHECK_THROWS_WITH_AS(
        sinkhorn_vjp(policy, Sinkhorn{}, saved, c.d_scores, saved.indices, c.logits, wide.noise, c.mask),
        "colt5: `noise` must have shape (2, 3, 5), but has (2, 3, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(
        sinkhorn_vjp(policy, Sinkhorn{}, saved, c.d_scores, saved.indices, c.logits, c.noise, wide.mask),
        "colt5: `mask` must have shape (2, 5), but has (2, 6)", ShapeError);
}

TEST_CASE(
    "gumbel noise: every row, slot and token of a stream has a number of its own, to the last that an index holds") {
    const Random random(Seed{3}, 5);
    const Index last_token = (Index{1} << 31) - 1;
    const std::uint64_t last_row = (std::uint64_t{1} << 32) - 1;
    std::set<double> numbers;
    std::size_t count = 0;
    const std::vector<Index> places{0, 1, (Index{1} << 20), (Index{1} << 24), (Index{1} << 24) + 1, last_token};
    for (const std::uint64_t stream : {0u, 1u, 20u, 24u, 44u})
        for (const std::uint64_t row :
             {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{1} << 20, std::uint64_t{1} << 31, last_row})
            for (const Index slot : places)
                for (const Index token : places) {
                    numbers.insert(gumbel_of(Random(Seed{3}, stream), row, slot, token));
                    ++count;
                }
    CHECK(numbers.size() == count);

    const Cpu policy(1);
    const auto noise = gumbel_noise<double>(policy, random, 5, 1, 2, {(Index{1} << 32) - 2, 2});
    for (Index row = 0; row < 5; ++row)
        for (Index token = 0; token < 2; ++token)
            CHECK(noise.const_view()(row, 0, token) ==
                  gumbel_of(random, last_row - 1 + static_cast<std::uint64_t>(row % 2), 0, token));
    CHECK_THROWS_WITH_AS(gumbel_noise<double>(policy, random, 3, 1, 2, {(Index{1} << 32) - 2}),
                         "colt5: `rows` must be at most 2^32, counted from the first row of the stream, but is 3",
                         ValueError);
    CHECK_THROWS_WITH_AS(gumbel_noise<double>(policy, Random(Seed{3}, std::uint64_t{1} << 32), 1, 1, 2),
                         "colt5: `random` must be a stream below 2^32, but is 4294967296", ValueError);
    CHECK_THROWS_AS(gumbel_noise<double>(policy, random, 1, 1, last_token + 2), ValueError);
    CHECK_THROWS_AS(gumbel_noise<double>(policy, random, 1, last_token + 2, 1), ValueError);
}
