// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

#include <colt5/core/tensor.hpp>
#include <colt5/cpu/eigen.hpp>
#include <colt5/cpu/expr.hpp>
#include <colt5/expr/expr.hpp>

/// Numbers for the tests of expressions.
namespace samples {

using colt5::Cpu;
using colt5::Index;

/// Reproducible numbers in [low, high).
class Numbers {
public:
    explicit Numbers(std::uint64_t seed = 1) : state_(seed * 2862933555777941757u + 3037000493u) {}
    double operator()(double low, double high) {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return low + (high - low) * static_cast<double>(state_ >> 40) / static_cast<double>(1 << 24);
    }

private:
    std::uint64_t state_;
};

template <typename T>
colt5::MatrixTensor<T, Cpu> matrix(const Cpu& policy, Index rows, Index columns, double low, double high,
                                   std::uint64_t seed = 1) {
    colt5::MatrixTensor<T, Cpu> result(policy, {rows, columns});
    Numbers numbers(seed);
    for (Index i = 0; i < result.size(); ++i) result.data()[i] = static_cast<T>(numbers(low, high));
    return result;
}

template <typename T>
colt5::VectorTensor<T, Cpu> vector(const Cpu& policy, Index size, double low, double high, std::uint64_t seed = 2) {
    colt5::VectorTensor<T, Cpu> result(policy, {size});
    Numbers numbers(seed);
    for (Index i = 0; i < size; ++i) result.data()[i] = static_cast<T>(numbers(low, high));
    return result;
}

/// Whether `got` is `want` up to `ulps` units in the last place of max(|want|, scale).
template <typename T>
bool close(T got, double want, double ulps, double scale = 0) {
    if (std::isnan(want) || std::isinf(want))
        return got == static_cast<T>(want) || (std::isnan(want) && std::isnan(got));
    const double unit = static_cast<double>(std::numeric_limits<T>::epsilon());
    return std::abs(static_cast<double>(got) - want) <= ulps * unit * std::fmax(std::abs(want), scale);
}

/// Compares make(x, y) with naive(x, y), entry by entry, for random x and y in [low, high). Every number of columns up
/// to 70 has every kind of tail; three rows put rows at odd addresses. The first entry that is wrong, as "column of
/// columns", or "none".
template <typename T, typename Make, typename Naive>
std::string first_wrong(double low, double high, double ulps, const Make& make, const Naive& naive) {
    const Cpu policy(1);
    for (Index columns = 1; columns <= 70; ++columns) {
        const auto x = matrix<T>(policy, 3, columns, low, high, 1);
        const auto y = matrix<T>(policy, 3, columns, low, high, 2);
        using Value = typename decltype(make(x, y))::value_type;
        colt5::MatrixTensor<Value, Cpu> out(policy, {3, columns});
        assign(policy, out, make(x, y));
        for (Index i = 0; i < x.size(); ++i) {
            const double want = naive(static_cast<double>(x.data()[i]), static_cast<double>(y.data()[i]));
            bool right;
            if constexpr (std::is_same_v<Value, bool>)
                right = out.data()[i] == (want == 1);
            else
                right = close(out.data()[i], want, ulps);
            if (!right) return std::to_string(i % columns) + " of " + std::to_string(columns);
        }
    }
    return "none";
}

}  // namespace samples
