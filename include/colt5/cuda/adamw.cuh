// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/adamw.hpp>

namespace colt5 {

namespace cuda {

/// AdamWCoefficients in the type in which an update is computed.
template <typename Real>
struct AdamWFactors {
    Real keep, mean_rate, beta2, square_rate, step_size, square_bias, eps;
};

template <typename T>
__global__ void adamw(T* parameter, accumulate_t<T>* master, const accumulate_t<T>* gradient, accumulate_t<T>* mean,
                      accumulate_t<T>* square, Index size, AdamWFactors<accumulate_t<T>> c, bool packed) {
    using Real = accumulate_t<T>;
    for_each_pack<pack_size<Real>>(size, packed, [&]<int width>(Index i, std::integral_constant<int, width>) {
        const auto gradients = load_pack<width>(gradient + i);
        auto parameters = load_pack<width>(parameter + i);
        auto means = load_pack<width>(mean + i), squares = load_pack<width>(square + i);
        Pack<Real, width> values;
        if constexpr (HalfPrecision<T>) {
            values = load_pack<width>(master + i);
            for (int e = 0; e < width; ++e)  // the parameter was written since the last step
                if (T(values.values[e]).bits() != parameters.values[e].bits())
                    values.values[e] = static_cast<Real>(parameters.values[e]);
        } else {
            values = parameters;
        }
        for (int e = 0; e < width; ++e) {
            const Real g = gradients.values[e];
            Real &m = means.values[e], &s = squares.values[e];
            m += c.mean_rate * (g - m);
            s = c.beta2 * s + c.square_rate * (g * g);
            const Real divisor = ::sqrt(s) / c.square_bias + c.eps;
            values.values[e] = c.keep * values.values[e] - c.step_size * (divisor == Real(0) ? Real(0) : m / divisor);
            parameters.values[e] = static_cast<T>(values.values[e]);
        }
        if constexpr (HalfPrecision<T>) store_pack(master + i, values);
        store_pack(parameter + i, parameters);
        store_pack(mean + i, means);
        store_pack(square + i, squares);
    });
}

}  // namespace cuda

template <typename T>
void adamw_kernel(const Cuda& policy, VectorView<T> parameter, VectorView<accumulate_t<T>> master,
                  VectorView<const accumulate_t<T>> gradient, VectorView<accumulate_t<T>> mean,
                  VectorView<accumulate_t<T>> square, const AdamWCoefficients& c) {
    using Real = accumulate_t<T>;
    const cuda::AdamWFactors<Real> factors{static_cast<Real>(c.keep),      static_cast<Real>(1 - c.beta1),
                                           static_cast<Real>(c.beta2),     static_cast<Real>(1 - c.beta2),
                                           static_cast<Real>(c.step_size), static_cast<Real>(c.square_bias),
                                           static_cast<Real>(c.eps)};
    constexpr int threads = 256;
    cuda::launch(policy, "adamw", cuda::adamw<T>, cuda::blocks_for(parameter.size(), threads), threads, 0,
                 parameter.data(), master.data(), gradient.data(), mean.data(), square.data(), parameter.size(),
                 factors,
                 cuda::fits_packs<T>(0, parameter.data(), master.data(), gradient.data(), mean.data(), square.data()));
}

}  // namespace colt5
