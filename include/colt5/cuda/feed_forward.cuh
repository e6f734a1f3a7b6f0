// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/column_sums.cuh>
#include <colt5/cuda/fused_feed_forward.cuh>
#include <colt5/cuda/gelu.cuh>
#include <colt5/cuda/linear.cuh>
#include <colt5/cuda/rms_norm.cuh>
#include <colt5/cuda/warp_row.cuh>
#include <colt5/op/feed_forward.hpp>

namespace colt5 {

namespace cuda {

/// y = gelu(x), d_y ← d_y · gelu'(x), and what the rows of a block add to their sum; y may be x. One warp a row.
template <int width, int packs, typename T>
__global__ void __launch_bounds__(sum_threads)
    gelu_with_vjp(T* y, T* d_y, const T* x, Index d, accumulate_t<T>* partial, accumulate_t<T>* global, Index rows,
                  Index rows_each) {
    using Sum = accumulate_t<T>;
    const WarpSums<Sum> sums(global, d);
    LaneSums<Sum, 1, width, packs> of_lane(sums.mine(), d);
    const Index end = ::min(rows, (blockIdx.x + 1) * rows_each), warps = sum_threads / warp_size;
    for (Index row = blockIdx.x * rows_each + threadIdx.x / warp_size; row < end; row += warps) {
        const WarpRow<T, width, packs> in(x + row * d, d), d_out(d_y + row * d, d);
        in.for_each_with(
            [&](int i, Index j, const auto& xs, const auto& dys) {
                Pack<T, width> out, d_in;
                for (int e = 0; e < width; ++e) {
                    const Sum v = static_cast<Sum>(xs.values[e]);
                    const Gelu<T> gelu(v);
                    out.values[e] = static_cast<T>(gelu.value);
                    d_in.values[e] = static_cast<T>(static_cast<Sum>(dys.values[e]) * gelu.slope);
                    of_lane.add(0, i, j, e, static_cast<Sum>(d_in.values[e]));
                }
                store_pack(y + row * d + j, out);
                store_pack(d_y + row * d + j, d_in);
            },
            d_out);
    }
    of_lane.flush();
    sums.write(partial);
}

}  // namespace cuda

/// In 16 bits one fused kernel where that takes the sizes at hand; otherwise norm, product, GELU and product.
template <typename T>
void feed_forward_kernel(const Cuda& policy, TokensView<T> y, TokensView<T> pre_activation, TokensView<const T> x,
                         const FeedForwardParameters<const T>& parameters, TokensView<const T> add) {
    if constexpr (HalfPrecision<T>)
        if (cuda::fused::supports(policy, y, pre_activation, x, parameters, add))
            return cuda::fused::launch_feed_forward(policy, y, pre_activation, x, parameters, add);
    const auto& [norm, hidden_weight, hidden_bias, project_weight, project_bias] = parameters;
    TokensTensor<T, Cuda> h(policy, {x.extent(0), x.extent(1), hidden_weight.extent(0)});
    if (!pre_activation) pre_activation = h.view();
    {
        auto normed = tensor_like(policy, x);  // (b, n, d)
        rms_norm_kernel(policy, normed.view().rows(), x.rows(), norm);
        linear_kernel(policy, detail::one_route(pre_activation), detail::one_route(normed.const_view()), hidden_weight,
                      hidden_bias);  // (b, n, h)
    }
    cuda::launch_gelu<T>(policy, h.data(), pre_activation.data(), h.size());
    linear_add_kernel(policy, y, h.const_view(), project_weight, project_bias, add);  // (b, n, d)
}

/// One pass over `pre_activation` makes GELU, its gradient and that of the bias.
template <typename T, std::size_t updates>
void feed_forward_vjp_kernel(const Cuda& policy, TokensView<T> d_x,
                             const FeedForwardParameters<accumulate_t<T>>& gradients, TokensView<const T> d_y,
                             TokensView<const T> x, TokensView<const T> pre_activation,
                             const FeedForwardParameters<const T>& parameters,
                             const GradientEpilogue<T, Cuda, updates>& epilogue) {
    const Index batch = x.extent(0), length = x.extent(1), rows = batch * length, d = x.extent(2);
    const Index hidden = parameters.hidden_weight.extent(0);
    auto normed = normalize(policy, x, parameters.norm);  // (b, n, d)
    TokensTensor<T, Cuda> h(policy, {batch, length, hidden}), d_h(policy, {batch, length, hidden});
    if (!pre_activation) linear(policy, h.view(), normed, parameters.hidden_weight, parameters.hidden_bias);
    if (!pre_activation) pre_activation = h.const_view();
    cuda::linear_input_gradient<T>(policy, length, hidden, d, cuda::of_tokens(d_h.data(), length, hidden),
                                   cuda::of_tokens<const T>(d_y.data(), length, d), parameters.project_weight.data(),
                                   batch);
    cuda::with_warp_row<T>(
        hidden,
        [&]<int width, int packs>() {
            cuda::launch_with_sums(policy, "gelu_with_vjp", cuda::gelu_with_vjp<width, packs, T>,
                                   cuda::Totals<accumulate_t<T>, 1>{{gradients.hidden_bias.data()}, hidden}, rows,
                                   h.data(), d_h.data(), pre_activation.data(), hidden);
        },
        h.data(), d_h.data(), pre_activation.data());
    cuda::add_weight_gradient(policy, rows, hidden, d, gradients.project_weight.data(), d_y.data(),
                              static_cast<const T*>(h.data()));
    cuda::add_column_sums(policy, gradients.project_bias.data(), rows, cuda::RouteRows<T>{d_y.data(), length, 1, 0, d});
    cuda::add_weight_gradient(policy, rows, d, hidden, gradients.hidden_weight.data(),
                              static_cast<const T*>(d_h.data()), static_cast<const T*>(normed.data()));
    cuda::linear_input_gradient<T>(policy, length, d, hidden, cuda::of_tokens(normed.data(), length, d),
                                   cuda::of_tokens<const T>(d_h.data(), length, hidden),
                                   parameters.hidden_weight.data(),
                                   batch);  // normed is not read any more
    rms_norm_vjp_kernel(policy, d_x, gradients.norm, normed.const_view(), x, parameters.norm, epilogue);
}

}  // namespace colt5
