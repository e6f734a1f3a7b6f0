// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>
#include <vector>

#include <colt5/cpu/rotary.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

// batch, rows, groups, heads of a group, dim_head, heads that are rotated
constexpr std::array<std::array<Index, 6>, 8> shapes{{{1, 1, 1, 1, 2, 1},
                                                      {2, 5, 1, 3, 4, 3},
                                                      {3, 70, 4, 2, 16, 1},
                                                      {1, 300, 1, 6, 34, 4},
                                                      {2, 9, 2, 2, 64, 0},
                                                      {2, 0, 1, 2, 8, 1},
                                                      {0, 3, 1, 2, 8, 1},
                                                      {2, 3, 1, 2, 0, 1}}};

template <typename T>
HostTensor<T, 5> heads_of(const Cpu& policy, const std::array<Index, 6>& s, std::uint64_t stream) {
    return normal<T>(policy, std::array{s[0], s[1], s[2], s[3], s[4]}, stream);
}
/// Some token of a sequence of `length`, for each row.
HostTensor<TokenIndex, 2> random_positions(const Cpu& policy, Index batch, Index rows, double length) {
    HostTensor<TokenIndex, 2> positions(policy, {batch, rows});
    const Random random(Seed{3});
    fill_with(policy, positions, [&](std::size_t i) { return std::floor(random.uniform(i) * length); });
    return positions;
}

/// The formula in long double.
template <Viewable X>
HostTensor<double, 5> naive(const Cpu& policy, const X& x, Index heads, const VectorTensor<float, Cpu>& f,
                            const RowPositions& at, long double sign) {
    HostTensor<double, 5> out(policy, x.shape());
    const auto from = x.const_view();
    const auto [batch, rows, groups, all, dim_head] = x.shape();
    const Index pairs = dim_head / 2;
    for (Index b = 0; b < batch; ++b)
        for (Index i = 0; i < rows; ++i)
            for (Index g = 0; g < groups; ++g)
                for (Index h = 0; h < all; ++h)
                    for (Index e = 0; e < dim_head; ++e) {
                        const auto position = static_cast<long double>(at.indices ? at.indices(b, i) : at.first + i);
                        const long double angle = sign * position * static_cast<long double>(f.data()[e % pairs]);
                        const long double other =
                            e < pairs ? -from(b, i, g, h, e + pairs) : from(b, i, g, h, e - pairs);
                        out.view()(b, i, g, h, e) = static_cast<double>(
                            h < heads ? from(b, i, g, h, e) * std::cos(angle) + other * std::sin(angle)
                                      : static_cast<long double>(from(b, i, g, h, e)));
                    }
    return out;
}

template <Viewable X>
double absolute_error(const X& actual, const HostTensor<double, 5>& expected) {
    double worst = 0;
    for (Index i = 0; i < actual.size(); ++i)
        worst = std::fmax(worst, std::abs(static_cast<double>(actual.data()[i]) - expected.data()[i]));
    return worst;
}

}  // namespace

TEST_CASE_TEMPLATE("rotary: pairs are rotated by position times frequency, near and far", T, float, double) {
    const Cpu policy(2);
    for (const auto& shape : shapes) {
        CAPTURE(shape_string(shape));
        const auto f = rotary_frequencies(policy, shape[4]);
        for (const double last : {300.0, 0x1p20, 0x1p29, 0x1p31 - 1000}) {
            CAPTURE(last);
            const auto some = random_positions(policy, shape[0], shape[1], last);
            for (const RowPositions& at :
                 {RowPositions{some.const_view()}, RowPositions{{}, static_cast<Index>(last)}}) {
                auto x = heads_of<T>(policy, shape, 0);
                const auto expected = naive(policy, x, shape[5], f, at, 1);
                const auto expected_back = naive(policy, x, shape[5], f, at, -1);
                auto back = copy_of(policy, x);
                rotary(policy, x.view(), shape[5], f, at);
                rotary_vjp(policy, back.view(), shape[5], f, at);
                // Pairs are below 8.
                const double tolerance = 8 * (std::is_same_v<T, float> ? 3e-7 : last <= 0x1p29 ? 1e-13 : 3e-8);
                CHECK(absolute_error(x, expected) <= tolerance);
                CHECK(absolute_error(back, expected_back) <= tolerance);
            }
        }
    }
}

TEST_CASE("rotary: angles are within 2e-14 at every position below 2^29, for frequencies from 1e-4 to 1") {
    const Random random(Seed{4});
    long double worst = 0, largest = 0;
    for (std::size_t i = 0; i < 200000; ++i) {
        const double position = std::floor(std::exp2(29 * random.uniform(2 * i)));
        const auto frequency = static_cast<double>(static_cast<float>(std::exp(-9.2 * random.uniform(2 * i + 1))));
        const auto angle = static_cast<long double>(colt5::detail::rotary_angle(position, frequency));
        const auto exact = static_cast<long double>(position * frequency);  // 53 bits
        worst = std::max(worst, std::abs(std::sin(angle) - std::sin(exact)));
        worst = std::max(worst, std::abs(std::cos(angle) - std::cos(exact)));
        largest = std::max(largest, std::abs(angle));
    }
    CHECK(worst <= 2e-14L);
    CHECK(largest <= 3.1416L);
}

TEST_CASE("rotary: frequencies are those of the reference, bit for bit") {
    const Cpu policy(1);
    const auto values = [&](Index dim_head) { return to_host(policy, rotary_frequencies(policy, dim_head)); };
    CHECK(values(0).empty());
    CHECK(values(2) == std::vector<float>{1});
    CHECK(values(8) == std::vector<float>{1, 0x1.99999ap-4f, 0x1.47ae14p-7f, 0x1.0624dep-10f});
    CHECK(values(64)[1] == 0x1.7ff222p-1f);
    CHECK(values(64)[31] == 0x1.17a8e4p-13f);
    CHECK_THROWS_WITH_AS(rotary_frequencies(policy, 7), "colt5: `dim_head` must be even, but is 7", ValueError);
}

TEST_CASE("rotary: inner products depend on the distance alone") {
    const Cpu policy(1);
    const auto f = rotary_frequencies(policy, 64);
    const std::array<Index, 5> shape{1, 1, 1, 1, 64};
    const auto product = [&](Index of_q, Index of_k) {
        auto q = normal<double>(policy, shape, 0), k = normal<double>(policy, shape, 1);
        rotary(policy, q.view(), 1, f, {{}, of_q});
        rotary(policy, k.view(), 1, f, {{}, of_k});
        return inner(q, k);
    };
    const double at_seven = product(7, 0);
    CHECK(std::abs(at_seven - product(8, 0)) > 0.1);
    for (const Index first : {1, 1000, 1 << 20, 1 << 28})
        CHECK(std::abs(product(first + 7, first) - at_seven) <= 1e-11);
}

TEST_CASE("rotary_vjp: the gradient by finite differences, and the inverse") {
    const Cpu policy(2);
    const std::array<Index, 6> shape{2, 5, 2, 3, 6, 2};
    const auto f = rotary_frequencies(policy, shape[4]);
    const auto positions = random_positions(policy, 2, 5, 1e6);
    const RowPositions at{positions.const_view()};
    auto x = heads_of<double>(policy, shape, 0);
    const auto d_y = heads_of<double>(policy, shape, 1);
    auto d = copy_of(policy, d_y);
    rotary_vjp(policy, d.view(), shape[5], f, at);
    const auto loss = [&] {
        auto y = copy_of(policy, x);
        rotary(policy, y.view(), shape[5], f, at);
        return inner(d_y, y);
    };
    CHECK(relative_error(d, finite_differences(policy, x, loss)) <= 1e-8);
    rotary(policy, d.view(), shape[5], f, at);
    CHECK(relative_error(d, d_y) <= 1e-15);
}

TEST_CASE_TEMPLATE("rotary: same bits for a sequence alone, for rows in pieces, and for any number of threads", T,
                   float, double) {
    const Cpu one(1), two(2);
    const std::array<Index, 6> shape{3, 290, 2, 2, 22, 1};
    const auto f = rotary_frequencies(one, shape[4]);
    const auto start = heads_of<T>(one, shape, 0);
    auto x = copy_of(one, start), same = copy_of(one, start);
    rotary(two, x.view(), 1, f, {{}, 5});
    rotary(one, same.view(), 1, f, {{}, 5});
    CHECK(same_bits(x, same));
    for (Index b = 0; b < 3; ++b) {
        auto alone = copy_of(one, sequence(start, b));
        for (const auto& [first, rows] : {std::array<Index, 2>{0, 131}, std::array<Index, 2>{131, 159}})
            rotary(two,
                   View<T, dynamic, dynamic, dynamic, dynamic, dynamic>(alone.view()[0][first].data(),
                                                                        {1, rows, 2, 2, 22}),
                   1, f, {{}, 5 + first});
        CHECK(same_bits(alone, sequence(x, b)));
    }
    HostTensor<TokenIndex, 2> positions(one, {3, 290});
    fill_with(one, positions, [](std::size_t i) { return 5 + i % 290; });
    auto by_index = copy_of(one, start);
    rotary(two, by_index.view(), 1, f, {positions.const_view()});
    CHECK(same_bits(by_index, x));
}

TEST_CASE("rotary: errors name the argument and what is wrong") {
    const Cpu policy(1);
    auto x = normal<double>(policy, std::array<Index, 5>{2, 3, 1, 4, 6}, 0);
    auto odd = normal<double>(policy, std::array<Index, 5>{2, 3, 1, 4, 5}, 0);
    const auto f = rotary_frequencies(policy, 6), few = rotary_frequencies(policy, 4);
    const auto positions = random_positions(policy, 2, 4, 10);
    CHECK_THROWS_WITH_AS(rotary(policy, odd.view(), 4, few, {}), "colt5: `dim_head of x` must be even, but is 5",
                         ValueError);
    CHECK_THROWS_WITH_AS(rotary(policy, x.view(), 4, few, {}), "colt5: `inv_freq` must have shape (3), but has (2)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(rotary(policy, x.view(), 5, f, {}),
                         "colt5: `heads` must be in [0, 4], the heads of x, but is 5", ValueError);
    CHECK_THROWS_WITH_AS(rotary(policy, x.view(), 4, f, {positions.const_view()}),
                         "colt5: `positions` must have shape (2, 3), but has (2, 4)", ShapeError);
    CHECK_THROWS_WITH_AS(rotary_vjp(policy, x.view(), 4, f, {{}, -1}), "colt5: `first` must be >= 0, but is -1",
                         ValueError);
    CHECK_THROWS_AS(rotary_vjp(policy, x.view(), 4, f, {{}, Index{1} << 31}), ValueError);
}
