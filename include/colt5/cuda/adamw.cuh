// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/launch.cuh>
#include <colt5/op/adamw.hpp>

namespace colt5 {

namespace cuda {

/// The coefficients in the type that an update is computed in.
template <typename Real>
struct AdamWFactors {
    Real keep, mean_rate, beta2, square_rate, step_size, square_bias, eps;
};

template <typename T>
__global__ void adamw(T* parameter, const T* gradient, accumulate_t<T>* mean, accumulate_t<T>* square, Index size,
                      AdamWFactors<accumulate_t<T>> c) {
    using Real = accumulate_t<T>;
    for (Index i = global_thread(); i < size; i += all_threads()) {
        const Real g = static_cast<Real>(gradient[i]);
        const Real m = mean[i] + c.mean_rate * (g - mean[i]);
        const Real s = c.beta2 * square[i] + c.square_rate * (g * g);
        mean[i] = m;
        square[i] = s;
        parameter[i] = static_cast<T>(c.keep * static_cast<Real>(parameter[i]) -
                                      c.step_size * (m / (sqrt(s) / c.square_bias + c.eps)));
    }
}

}  // namespace cuda

template <typename T>
void adamw_kernel(const Cuda& policy, VectorView<T> parameter, VectorView<const T> gradient,
                  VectorView<accumulate_t<T>> mean, VectorView<accumulate_t<T>> square, const AdamWCoefficients& c) {
    using Real = accumulate_t<T>;
    const cuda::AdamWFactors<Real> factors{static_cast<Real>(c.keep),      static_cast<Real>(1 - c.beta1),
                                           static_cast<Real>(c.beta2),     static_cast<Real>(1 - c.beta2),
                                           static_cast<Real>(c.step_size), static_cast<Real>(c.square_bias),
                                           static_cast<Real>(c.eps)};
    constexpr int threads = 256;
    cuda::launch(policy, "adamw", cuda::adamw<T>, cuda::blocks_for(parameter.size(), threads), threads, 0,
                 parameter.data(), gradient.data(), mean.data(), square.data(), parameter.size(), factors);
}

}  // namespace colt5
