// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/adamw.hpp>

namespace colt5 {

/// Each element by itself, so that threads change nothing.
template <typename T>
void adamw_kernel(const Cpu& policy, VectorView<T> parameter, VectorView<const T> gradient, VectorView<T> mean,
                  VectorView<T> square, const AdamWCoefficients& c) {
    using Batch = cpu::Batch<T>;
    const Batch keep(static_cast<T>(c.keep)), mean_rate(static_cast<T>(1 - c.beta1)), beta2(static_cast<T>(c.beta2)),
        square_rate(static_cast<T>(1 - c.beta2)), step_size(static_cast<T>(c.step_size)),
        square_bias(static_cast<T>(c.square_bias)), eps(static_cast<T>(c.eps));

    constexpr Index piece = Index{1} << 14;
    const Index size = parameter.size();
    parallel_for(policy, (size + piece - 1) / piece, [&](Index i) {
        const Index first = i * piece;
        cpu::for_each_batch<T>(std::min(piece, size - first), [&](Index offset, Index count) {
            const Index at = first + offset;
            const Batch g = cpu::load(gradient.data() + at, count);
            Batch p = cpu::load(parameter.data() + at, count);
            Batch m = cpu::load(mean.data() + at, count);
            Batch s = cpu::load(square.data() + at, count);
            m = m + mean_rate * (g - m);
            s = beta2 * s + square_rate * (g * g);
            p = keep * p - step_size * (m / (xsimd::sqrt(s) / square_bias + eps));
            cpu::store(mean.data() + at, m, count);
            cpu::store(square.data() + at, s, count);
            cpu::store(parameter.data() + at, p, count);
        });
    });
}

}  // namespace colt5
