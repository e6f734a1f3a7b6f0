// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda.cuh>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

/// Numbers on the device, and their errors.
namespace cases {

using namespace colt5;

/// What a tensor holds, in double.
template <typename V>
std::vector<double> numbers(const Cuda& policy, const V& tensor) {
    std::vector<double> all;
    for (const auto& value : to_host(policy, tensor)) all.push_back(static_cast<double>(value));
    return all;
}

/// Largest difference, relative to the largest expected number; infinite where one is not finite.
inline double largest_error(const std::vector<double>& actual, const std::vector<double>& expected, double factor = 1) {
    double difference = 0, largest = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
        if (!std::isfinite(actual[i]) || !std::isfinite(expected[i])) return std::numeric_limits<double>::infinity();
        difference = std::max(difference, std::abs(actual[i] * factor - expected[i]));
        largest = std::max(largest, std::abs(expected[i]));
    }
    return difference / largest;
}

/// Normal numbers, rounded to T and then multiplied by `factor`, a power of two: with any factor, the same digits.
template <typename T>
MatrixTensor<T, Cuda> normal_rows(const Cuda& policy, Index rows, Index columns, std::uint64_t seed, double factor) {
    std::vector<T> values;
    const Random random(Seed{seed});
    for (Index i = 0; i < rows * columns; ++i)
        values.push_back(static_cast<T>(
            static_cast<double>(static_cast<float>(static_cast<T>(random.normal(static_cast<std::uint64_t>(i))))) *
            factor));
    return from_host<MatrixTensor<T, Cuda>>(policy, {rows, columns}, values);
}

}  // namespace cases
