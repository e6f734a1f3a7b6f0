// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <set>
#include <vector>

#include <colt5/core/random.hpp>
#include <colt5/cpu/policy.hpp>

using namespace colt5;

namespace {

struct Moments {
    double mean, variance, skewness, smallest, largest;
};

template <typename Draw>
Moments moments(Draw draw) {
    constexpr std::uint64_t count = 200000;
    double sum = 0, smallest = draw(0), largest = smallest;
    for (std::uint64_t i = 0; i < count; ++i) {
        const double x = draw(i);
        sum += x;
        smallest = std::min(smallest, x);
        largest = std::max(largest, x);
    }
    const double mean = sum / count;
    double squares = 0, cubes = 0;
    for (std::uint64_t i = 0; i < count; ++i) {
        const double x = draw(i) - mean;
        squares += x * x;
        cubes += x * x * x;
    }
    const double variance = squares / count;
    return {mean, variance, cubes / count / std::pow(variance, 1.5), smallest, largest};
}

}  // namespace

TEST_CASE("philox: the known answers of Random123 for philox4x32-10") {
    using Numbers = std::array<std::uint32_t, 4>;
    CHECK(philox({0, 0, 0, 0}, 0) == Numbers{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
    CHECK(philox({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, 0xffffffffffffffff) ==
          Numbers{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
    CHECK(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822) ==
          Numbers{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("random: uniform numbers never reach 0 or 1") {
    CHECK(to_unit_interval(0, 0) > 0);
    CHECK(to_unit_interval(0xffffffff, 0xffffffff) < 1);
    CHECK(to_unit_interval(0x80000000, 0) == doctest::Approx(0.5));
    CHECK(to_unit_interval(0, 1 << 12) > to_unit_interval(0, 0));
    CHECK(to_unit_interval(0, (1 << 12) - 1) == to_unit_interval(0, 0));  // 52 bits
}

TEST_CASE("random: moments of the uniform, the normal and the Gumbel distribution") {
    const Random random(Seed{42}, 3);
    const auto uniform = moments([&](std::uint64_t i) { return random.uniform(i); });
    CHECK(uniform.mean == doctest::Approx(0.5).epsilon(0.01));
    CHECK(uniform.variance == doctest::Approx(1.0 / 12).epsilon(0.01));
    CHECK(std::abs(uniform.skewness) < 0.02);
    CHECK(uniform.smallest < 1e-4);
    CHECK(uniform.largest > 1 - 1e-4);

    const auto normal = moments([&](std::uint64_t i) { return random.normal(i); });
    CHECK(std::abs(normal.mean) < 0.01);
    CHECK(normal.variance == doctest::Approx(1).epsilon(0.01));
    CHECK(std::abs(normal.skewness) < 0.03);
    CHECK(normal.smallest < -4);
    CHECK(normal.largest > 4);

    const auto gumbel = moments([&](std::uint64_t i) { return random.gumbel(i); });
    CHECK(gumbel.mean == doctest::Approx(std::numbers::egamma).epsilon(0.02));
    CHECK(gumbel.variance == doctest::Approx(std::numbers::pi * std::numbers::pi / 6).epsilon(0.02));
    CHECK(gumbel.skewness == doctest::Approx(1.13955).epsilon(0.05));
}

TEST_CASE("random: neighbours, streams and seeds are uncorrelated; the same place gives the same number") {
    const Random random(Seed{1}, 2), same(Seed{1}, 2), other_stream(Seed{1}, 3), other_seed(Seed{2}, 2);
    double neighbours = 0, streams = 0, seeds = 0, halves = 0;
    bool repeats = true;
    constexpr std::uint64_t count = 100000;
    for (std::uint64_t i = 0; i < count; ++i) {
        repeats = repeats && random.normal(i) == same.normal(i);
        neighbours += random.normal(i) * random.normal(i + 1) / count;
        halves += random.normal(i) * random.normal(i + (std::uint64_t{1} << 33)) / count;
        streams += random.normal(i) * other_stream.normal(i) / count;
        seeds += random.normal(i) * other_seed.normal(i) / count;
    }
    CHECK(repeats);
    CHECK(std::abs(neighbours) < 0.015);
    CHECK(std::abs(halves) < 0.015);  // the upper half of the counter counts
    CHECK(std::abs(streams) < 0.015);
    CHECK(std::abs(seeds) < 0.015);
}

TEST_CASE("random: a sequence of seeds hands out different streams") {
    SeedSequence first(Seed{7}), second(Seed{7}), other(Seed{8});
    std::set<double> seen;
    for (int i = 0; i < 100; ++i) {
        const double value = first.next().uniform(0);
        CHECK(value == second.next().uniform(0));
        seen.insert(value);
        seen.insert(other.next().uniform(0));
    }
    CHECK(seen.size() == 200);
    const auto seed = first.next_seed().value;
    CHECK(seed == second.next_seed().value);
    CHECK(seed != first.next_seed().value);
}

TEST_CASE("random: tensors are filled in row-major order, the same in every type") {
    const Cpu policy(1);
    const Random random(Seed{5}, 1);
    MatrixTensor<double, Cpu> doubles(policy, {3, 4});
    MatrixTensor<float, Cpu> floats(policy, {3, 4});
    fill_normal(policy, doubles, random, 2);
    fill_normal(policy, floats, random, 2);
    for (std::uint64_t i = 0; i < 12; ++i) {
        CHECK(doubles.data()[i] == 2 * random.normal(i));
        CHECK(floats.data()[i] == static_cast<float>(2 * random.normal(i)));
    }
    fill(policy, floats, 0.25);
    CHECK(to_host(policy, floats) == std::vector<float>(12, 0.25f));

    MatrixTensor<bool, Cpu> mask(policy, {2, 2});
    fill_with(policy, mask, [](std::size_t i) { return i == 2; });
    CHECK((!mask.data()[0] && !mask.data()[1] && mask.data()[2] && !mask.data()[3]));
}

TEST_CASE("random: a linear layer starts uniform within one over the root of its inputs") {
    const Cpu policy(1);
    MatrixTensor<float, Cpu> weight(policy, {100, 64});
    fill_linear_uniform(policy, weight, Random(Seed{6}), 64);
    float smallest = 0, largest = 0;
    double squares = 0;
    for (const float w : to_host(policy, weight)) {
        smallest = std::min(smallest, w);
        largest = std::max(largest, w);
        squares += static_cast<double>(w) * static_cast<double>(w);
    }
    CHECK(smallest >= -0.125f);
    CHECK(largest <= 0.125f);
    CHECK(smallest < -0.124f);
    CHECK(largest > 0.124f);
    CHECK(squares / 6400 == doctest::Approx(0.125 * 0.125 / 3).epsilon(0.05));
}
