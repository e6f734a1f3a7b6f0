// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <utility>

#include <colt5/core/allocations.hpp>
#include <colt5/core/random.hpp>
#include <colt5/core/tensor.hpp>
#include <colt5/cpu/policy.hpp>

/// What the tests of operations share: random tensors, comparisons and finite differences.
namespace support {

using colt5::Cpu, colt5::Index, colt5::Tensor;

namespace detail {
template <typename T, std::size_t... I>
auto all_dynamic(std::index_sequence<I...>) -> Tensor<T, Cpu, (static_cast<void>(I), colt5::dynamic)...>;
}  // namespace detail

/// Tensor with `rank` extents known at run time.
template <typename T, std::size_t rank>
using HostTensor = decltype(detail::all_dynamic<T>(std::make_index_sequence<rank>()));

/// Normal numbers, the same in float and double up to rounding; another `stream`, other numbers.
template <typename T, std::size_t rank>
HostTensor<T, rank> normal(const Cpu& policy, const std::array<Index, rank>& shape, std::uint64_t stream,
                           double deviation = 1) {
    HostTensor<T, rank> tensor(policy, shape);
    colt5::fill_normal(policy, tensor, colt5::Random(colt5::Seed{1}, stream), deviation);
    return tensor;
}

template <typename T, std::size_t rank>
HostTensor<T, rank> filled(const Cpu& policy, const std::array<Index, rank>& shape, double value) {
    HostTensor<T, rank> tensor(policy, shape);
    colt5::fill(policy, tensor, value);
    return tensor;
}

/// True with the given probability.
template <std::size_t rank>
HostTensor<bool, rank> random_mask(const Cpu& policy, const std::array<Index, rank>& shape, std::uint64_t stream,
                                   double probability = 0.7) {
    HostTensor<bool, rank> mask(policy, shape);
    const colt5::Random random(colt5::Seed{2}, stream);
    colt5::fill_with(policy, mask, [&](std::size_t i) { return random.uniform(i) < probability; });
    return mask;
}

template <colt5::Viewable V>
auto copy_of(const Cpu& policy, const V& tensor) {
    auto copy = colt5::tensor_like(policy, tensor);
    colt5::upload(policy, copy.data(), tensor.const_view().data(),
                  static_cast<std::size_t>(copy.size()) * sizeof(typename V::value_type));
    return copy;
}

/// The b-th sequence as a batch of one.
template <colt5::Viewable V>
auto sequence(const V& tensor, Index b) {
    auto shape = tensor.shape();
    shape[0] = 1;
    const auto view = tensor.const_view();
    Index stride = 1;
    for (std::size_t axis = 1; axis < shape.size(); ++axis) stride *= shape[axis];
    return decltype(view)(view.data() + b * stride, shape);
}

/// Σ a ∘ b in double: the loss whose gradient with respect to b is a.
template <colt5::Viewable A, colt5::Viewable B>
double inner(const A& a, const B& b) {
    double sum = 0;
    for (Index i = 0; i < a.const_view().size(); ++i)
        sum += static_cast<double>(a.const_view().data()[i]) * static_cast<double>(b.const_view().data()[i]);
    return sum;
}

/// Largest difference, relative to the largest expected entry; infinite if the shapes differ or an entry is not finite.
template <colt5::Viewable A, colt5::Viewable E>
double relative_error(const A& actual, const E& expected) {
    const auto a = actual.const_view();
    const auto e = expected.const_view();
    if (a.shape() != e.shape()) return std::numeric_limits<double>::infinity();
    double difference = 0, scale = 0;
    for (Index i = 0; i < a.size(); ++i) {
        const auto x = static_cast<double>(a.data()[i]), y = static_cast<double>(e.data()[i]);
        if (!std::isfinite(x) || !std::isfinite(y)) return std::numeric_limits<double>::infinity();
        difference = std::max(difference, std::abs(x - y));
        scale = std::max(scale, std::abs(y));
    }
    return difference == 0 ? 0 : difference / std::max(scale, 1e-300);
}

template <colt5::Viewable A, colt5::Viewable B>
bool same_bits(const A& a, const B& b) {
    static_assert(std::is_same_v<typename A::value_type, typename B::value_type>);
    const auto bytes = static_cast<std::size_t>(a.const_view().size()) * sizeof(typename A::value_type);
    return a.shape() == b.shape() &&
           (bytes == 0 || std::memcmp(a.const_view().data(), b.const_view().data(), bytes) == 0);
}

/// factor · tensor
template <colt5::Viewable V>
auto times(const Cpu& policy, const V& tensor, double factor) {
    auto product = copy_of(policy, tensor);
    for (Index i = 0; i < product.size(); ++i)
        product.data()[i] = static_cast<typename V::value_type>(static_cast<double>(product.data()[i]) * factor);
    return product;
}

/// Powers of two whose products with normal numbers have squares that overflow.
template <typename T>
constexpr auto large_scales() {
    return std::is_same_v<T, float> ? std::array{0x1p66, 0x1p100, 0x1p124} : std::array{0x1p520, 0x1p900, 0x1p1020};
}

/// Leaves out a test case of finite differences under sanitizers, where it takes 30 times as long and other cases call
/// the same code.
inline const doctest::skip not_sanitized{colt5::is_sanitized};
/// Under sanitizers, or in an emulator, where `./dev cross` defines this macro: large cases take minutes.
#ifdef COLT5_TESTS_EMULATED
inline constexpr bool is_slow = true;
#else
inline constexpr bool is_slow = colt5::is_sanitized;
#endif

/// ∂loss/∂x, entry by entry, by central differences; `loss()` reads x.
template <colt5::Viewable X, typename Loss>
auto finite_differences(const Cpu& policy, X& x, Loss&& loss, double step = 1e-5) {
    auto gradient = colt5::tensor_like(policy, x);
    for (Index i = 0; i < x.size(); ++i) {
        auto& entry = x.view().data()[i];
        const auto value = entry;
        entry = value + step;
        const double above = loss();
        entry = value - step;
        const double below = loss();
        entry = value;
        gradient.data()[i] = (above - below) / (2 * step);
    }
    return gradient;
}

/// Error of gradient·direction against the central difference of `loss` along a random direction, relative to the
/// norm of the gradient. Cheap where finite_differences is not.
template <colt5::Viewable X, colt5::Viewable G, typename Loss>
double directional_error(const Cpu& policy, X& x, const G& gradient, Loss&& loss, double step = 1e-6) {
    const auto saved = copy_of(policy, x);
    const auto direction = colt5::to_host(policy, normal<double>(policy, std::array{x.size()}, 77));
    const auto loss_at = [&](double distance) {
        for (Index i = 0; i < x.size(); ++i)
            x.view().data()[i] = saved.data()[i] + distance * direction[static_cast<std::size_t>(i)];
        return loss();
    };
    const double slope = (loss_at(step) - loss_at(-step)) / (2 * step);
    loss_at(0);
    double along = 0;
    for (Index i = 0; i < x.size(); ++i)
        along += gradient.const_view().data()[i] * direction[static_cast<std::size_t>(i)];
    return std::abs(along - slope) / std::max(std::sqrt(inner(gradient, gradient)), 1e-300);
}

}  // namespace support
