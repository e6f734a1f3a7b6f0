// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <concepts>

#include <colt5/core/scalar.hpp>
#include <colt5/core/tensor.hpp>

namespace colt5 {

template <typename P>
void adamw_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `adamw` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// The numbers of one update, the same for every element.
struct AdamWCoefficients {
    double keep;         // 1 − lr · weight_decay
    double beta1;        // of the mean
    double beta2;        // of the squares
    double step_size;    // lr / (1 − beta1ᵗ)
    double square_bias;  // √(1 − beta2ᵗ)
    double eps;
};

/// One update of one parameter p by its gradient g (Loshchilov & Hutter, Decoupled Weight Decay Regularization, ICLR
/// 2019; in the order of torch.optim.AdamW):
///
///     p *= keep
///     mean += (1 − beta1)(g − mean),  square = beta2 · square + (1 − beta2) g²
///     p −= step_size · mean / (√square / square_bias + eps)          (nothing where the divisor is 0)
///
/// A parameter of bfloat16 or float16 is the rounding of its `master` in float, which is what the update is made on.
/// Where it is not, somebody has written it since, and the master takes over its value first. Parameters of float and
/// double have no master. All tensors have the same shape, and all but the parameter are float, or all double. Throws
/// ShapeError.
template <Policy P, typename Parameter, Viewable G, typename Moment>
void adamw_update(const P& policy, Parameter& parameter,
                  VectorView<accumulate_t<typename Parameter::value_type>> master, const G& gradient, Moment& mean,
                  Moment& square, const AdamWCoefficients& coefficients) {
    using T = typename Parameter::value_type;
    static_assert(std::same_as<typename Moment::value_type, accumulate_t<T>>,
                  "colt5: adamw_update takes `mean` and `square` in double for double and in float for all others");
    static_assert(same_scalar<Moment, G>, "colt5: `gradient` must have the scalar type of `mean`");
    expect_shape("gradient", gradient.shape(), parameter.shape());
    expect_shape("mean", mean.shape(), parameter.shape());
    expect_shape("square", square.shape(), parameter.shape());
    const std::array<Index, 1> flat{parameter.size()};
    expect_shape("master", master.shape(), {HalfPrecision<T> ? parameter.size() : 0});
    adamw_kernel(policy, parameter.view().reshape(flat), master, gradient.const_view().reshape(flat),
                 mean.view().reshape(flat), square.view().reshape(flat), coefficients);
}

}  // namespace colt5
