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
                  "colt5: no `adamw` kernel for this policy; for Cuda include <colt5/cuda.cuh> and compile with nvcc");
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
///     p −= step_size · mean / (√square / square_bias + eps)
///
/// All four tensors have the same shape and are float, or all double. Throws ShapeError.
template <Policy P, Viewable G, typename Parameter, typename Moment>
void adamw_update(const P& policy, Parameter& parameter, const G& gradient, Moment& mean, Moment& square,
                  const AdamWCoefficients& coefficients) {
    static_assert(std::same_as<typename Parameter::value_type, accumulate_t<typename Parameter::value_type>>,
                  "colt5: adamw_update trains float and double; see AdamW for parameters of 16 bits");
    static_assert(std::same_as<typename Moment::value_type, typename Parameter::value_type>,
                  "colt5: adamw_update takes `mean` and `square` in the parameter's scalar");
    expect_shape("gradient", gradient.shape(), parameter.shape());
    expect_shape("mean", mean.shape(), parameter.shape());
    expect_shape("square", square.shape(), parameter.shape());
    const std::array<Index, 1> flat{parameter.size()};
    adamw_kernel(policy, parameter.view().reshape(flat), gradient.const_view().reshape(flat), mean.view().reshape(flat),
                 square.view().reshape(flat), coefficients);
}

}  // namespace colt5
