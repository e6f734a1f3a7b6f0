// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numbers>

#include <colt5/core/macros.hpp>
#include <colt5/core/tensor.hpp>

namespace colt5 {

/// Where random numbers start. Two modules with the same seed draw the same numbers.
struct Seed {
    std::uint64_t value = 0;
};

/// Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011): four 32-bit numbers as a pure
/// function of a 128-bit counter and a 64-bit key, so that every backend and every order of evaluation draws the same.
COLT5_HOST_DEVICE inline std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::uint64_t key) {
    auto key0 = static_cast<std::uint32_t>(key), key1 = static_cast<std::uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * counter[0];
        const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * counter[2];
        counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key0, static_cast<std::uint32_t>(product1),
                   static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key1,
                   static_cast<std::uint32_t>(product0)};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

/// Uniform in the open interval (0, 1), from the upper 52 bits of two 32-bit numbers.
COLT5_HOST_DEVICE inline double to_unit_interval(std::uint32_t high, std::uint32_t low) {
    const std::uint64_t bits = ((static_cast<std::uint64_t>(high) << 32) | low) >> 12;
    return (static_cast<double>(bits) + 0.5) * 0x1p-52;
}

/// A counter-based stream of random numbers: the i-th number of stream `stream` under `seed`, in any order.
class Random {
public:
    COLT5_HOST_DEVICE explicit Random(Seed seed, std::uint64_t stream = 0) : seed_(seed.value), stream_(stream) {}

    /// Four words of 32 random bits each.
    COLT5_HOST_DEVICE std::array<std::uint32_t, 4> bits(std::uint64_t block) const {
        return philox({static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32),
                       static_cast<std::uint32_t>(stream_), static_cast<std::uint32_t>(stream_ >> 32)},
                      seed_);
    }
    /// Uniform in (0, 1).
    COLT5_HOST_DEVICE double uniform(std::uint64_t i) const {
        const auto words = bits(i / 2);
        return i % 2 == 0 ? to_unit_interval(words[0], words[1]) : to_unit_interval(words[2], words[3]);
    }
    /// Standard normal (Box–Muller).
    COLT5_HOST_DEVICE double normal(std::uint64_t i) const {
        const auto words = bits(i / 2);
        const double radius = std::sqrt(-2.0 * std::log(to_unit_interval(words[0], words[1])));
        const double angle = 2.0 * std::numbers::pi * to_unit_interval(words[2], words[3]);
        return radius * (i % 2 == 0 ? std::cos(angle) : std::sin(angle));
    }
    /// Standard Gumbel: −log(−log u).
    COLT5_HOST_DEVICE double gumbel(std::uint64_t i) const { return -std::log(-std::log(uniform(i))); }

    /// Part i of this stream, i < 2³²; stream() must be below 2³², too. A part is a stream of its own: it draws
    /// independently of other parts and of other streams below 2³². Part 0 is the stream itself.
    COLT5_HOST_DEVICE Random part(std::uint64_t i) const { return Random(Seed{seed_}, stream_ + (i << 32)); }
    std::uint64_t stream() const { return stream_; }

private:
    std::uint64_t seed_, stream_;
};

/// Hands out one stream after another, so that each parameter of a module has its own.
class SeedSequence {
public:
    explicit SeedSequence(Seed seed) : seed_(seed) {}
    Random next() { return Random(seed_, stream_++); }
    /// A seed for something that draws on its own at run time, such as a router's noise.
    Seed next_seed() {
        const Random random = next();
        return Seed{static_cast<std::uint64_t>(random.uniform(0) * 0x1p52)};
    }

private:
    Seed seed_;
    std::uint64_t stream_ = 0;
};

/// Fills on the host and uploads: the same numbers on every backend.
template <typename T, Policy P, Index... E, typename Draw>
void fill_with(const P& policy, Tensor<T, P, E...>& tensor, Draw&& draw) {
    const auto size = static_cast<std::size_t>(tensor.size());
    const auto values = std::make_unique<T[]>(size);  // not a vector, whose bools would be bits
    for (std::size_t i = 0; i < size; ++i) values[i] = static_cast<T>(draw(i));
    upload(policy, tensor.data(), values.get(), size * sizeof(T));
}

template <typename T, Policy P, Index... E>
void fill(const P& policy, Tensor<T, P, E...>& tensor, double value) {
    fill_with(policy, tensor, [value](std::size_t) { return value; });
}

/// Normal with mean 0 and standard deviation `deviation`; with 1, as torch.randn, which initializes routing tokens.
template <typename T, Policy P, Index... E>
void fill_normal(const P& policy, Tensor<T, P, E...>& tensor, Random random, double deviation = 1.0) {
    fill_with(policy, tensor, [&](std::size_t i) { return deviation * random.normal(i); });
}

/// Uniform in ±1/√fan_in, as torch.nn.Linear initializes weight and bias.
template <typename T, Policy P, Index... E>
void fill_linear_uniform(const P& policy, Tensor<T, P, E...>& tensor, Random random, Index fan_in) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(fan_in));
    fill_with(policy, tensor, [&](std::size_t i) { return bound * (2.0 * random.uniform(i) - 1.0); });
}

}  // namespace colt5
