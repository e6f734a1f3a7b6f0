// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <type_traits>

#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/adamw.hpp>

namespace colt5 {

namespace cpu {

/// Parameters of 16 bits: their master where it rounds to them, their own value where somebody has written them since.
template <HalfPrecision T>
Batch<float> load_parameter(const T* parameter, const float* master, Index count) {
    detail::Lanes<float> lane{};
    for (Index i = 0; i < count; ++i)
        lane.values[i] = T(master[i]).bits() == parameter[i].bits() ? master[i] : static_cast<float>(parameter[i]);
    return Batch<float>::load_aligned(lane.values);
}
template <HalfPrecision T>
void store_parameter(T* parameter, float* master, const Batch<float>& values, Index count) {
    store(master, values, count);
    for (Index i = 0; i < count; ++i) parameter[i] = T(master[i]);
}

template <std::floating_point T>
Batch<T> load_parameter(const T* parameter, const T*, Index count) {
    return load(parameter, count);
}
template <std::floating_point T>
void store_parameter(T* parameter, T*, const Batch<T>& values, Index count) {
    store(parameter, values, count);
}

}  // namespace cpu

/// Each element by itself, so that threads change nothing.
template <typename T>
void adamw_kernel(const Cpu& policy, VectorView<T> parameter, VectorView<accumulate_t<T>> master,
                  VectorView<const accumulate_t<T>> gradient, VectorView<accumulate_t<T>> mean,
                  VectorView<accumulate_t<T>> square, const AdamWCoefficients& c) {
    using Real = accumulate_t<T>;
    using Batch = cpu::Batch<Real>;
    const Batch keep(static_cast<Real>(c.keep)), mean_rate(static_cast<Real>(1 - c.beta1)),
        beta2(static_cast<Real>(c.beta2)), square_rate(static_cast<Real>(1 - c.beta2)),
        step_size(static_cast<Real>(c.step_size)), square_bias(static_cast<Real>(c.square_bias)),
        eps(static_cast<Real>(c.eps)), zero(Real(0));

    constexpr Index piece = Index{1} << 14;
    const Index size = parameter.size();
    const auto update = [&]<bool may_vanish>(Index first, std::bool_constant<may_vanish>) {
        cpu::for_each_batch<Real>(std::min(piece, size - first), [&](Index offset, Index count) {
            const Index at = first + offset;
            Real* const master_at = HalfPrecision<T> ? master.data() + at : nullptr;
            const Batch g = cpu::load(gradient.data() + at, count);
            Batch p = cpu::load_parameter(parameter.data() + at, master_at, count);
            Batch m = cpu::load(mean.data() + at, count);
            Batch s = cpu::load(square.data() + at, count);
            m = m + mean_rate * (g - m);
            s = beta2 * s + square_rate * (g * g);
            const Batch divisor = xsimd::sqrt(s) / square_bias + eps;
            Batch ratio = m / divisor;
            if constexpr (may_vanish) ratio = xsimd::select(divisor == zero, zero, ratio);
            p = keep * p - step_size * ratio;
            cpu::store(mean.data() + at, m, count);
            cpu::store(square.data() + at, s, count);
            cpu::store_parameter(parameter.data() + at, master_at, p, count);
        });
    };
    parallel_for(policy, divide_up(size, piece), [&](Index i) {
        if (static_cast<Real>(c.eps) > 0)  // the common case, without a comparison of each divisor
            update(i * piece, std::false_type());
        else
            update(i * piece, std::true_type());
    });
}

}  // namespace colt5
