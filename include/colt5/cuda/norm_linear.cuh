// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/cuda/layer_norm.cuh>
#include <colt5/cuda/linear.cuh>
#include <colt5/cuda/rms_norm.cuh>
#include <colt5/op/norm_linear.hpp>

namespace colt5 {

/// The norm, then a product for each projection.
template <typename T, std::size_t Count, typename Norm>
void norm_linear_kernel(const Cuda& policy, const std::array<Projection<T>, Count>& projections, TokensView<const T> x,
                        const Norm& norm) {
    const auto normed = normalize(policy, x, norm);
    for (const auto& [y, weight, bias] : projections)
        linear_kernel(policy, detail::one_route(y), detail::one_route(normed.const_view()), weight, bias);
}

/// Normalized rows are recomputed, which costs less than to have saved them.
template <typename T, typename Norm, typename NormGradients, std::size_t updates>
void norm_linear_vjp_kernel(const Cuda& policy, TokensView<T> d_x, const NormGradients& d_norm,
                            MatrixView<accumulate_t<T>> d_weight, VectorView<accumulate_t<T>> d_bias,
                            TokensView<const T> d_y, TokensView<const T> x, const Norm& norm,
                            MatrixView<const T> weight, const GradientEpilogue<T, Cuda, updates>& epilogue) {
    const auto d_normed = linear_vjp(policy, d_y, normalize(policy, x, norm), weight, d_weight, d_bias);
    normalize_vjp(policy, d_x, d_normed, x, norm, d_norm, epilogue);
}

}  // namespace colt5
