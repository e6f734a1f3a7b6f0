// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <numbers>

#include <colt5/cuda/column_sums.cuh>
#include <colt5/cuda/fused_feed_forward.cuh>
#include <colt5/cuda/kernel.cuh>
#include <colt5/cuda/linear.cuh>
#include <colt5/cuda/rms_norm.cuh>
#include <colt5/expr/functors.hpp>
#include <colt5/op/feed_forward.hpp>

namespace colt5 {

namespace cuda {

/// x · Φ(x), and its derivative Φ(x) + x φ(x), to the precision of numbers of type T.
template <typename T>
struct Gelu {
    using Sum = accumulate_t<T>;
    __device__ explicit Gelu(Sum x) : value(expr::scalar::gelu(x)), slope(expr::scalar::gelu_slope(x)) {}
    Sum value, slope;
};

/// With a = |x|: x Φ(x) = max(x, 0) − a Φ(−a), and Φ(−a) = exp(−a²/2) t P(t), t = 1 / (1 + 0.38 a), P fitted to a
/// relative error of 4e-5, a tenth of float16's.
template <HalfPrecision T>
struct Gelu<T> {
    __device__ explicit Gelu(float x) {
        const float a = ::fminf(::fabsf(x), 32.0f);  // beyond 32, Φ(−a) is 0; a NaN of x remains in `bell`
        float t, bell;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(t) : "f"(::fmaf(0.38f, a, 1.0f)));
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(bell) : "f"(-0.72134752f * x * x));
        float p = -0.08992639f;
        p = ::fmaf(p, t, 0.18887252f);
        p = ::fmaf(p, t, 0.09198286f);
        p = ::fmaf(p, t, 0.15782826f);
        p = ::fmaf(p, t, 0.15122533f);
        const float tail = p * t * bell;  // Φ(−a)
        constexpr auto density = static_cast<float>(std::numbers::inv_sqrtpi / std::numbers::sqrt2);
        const float along = a * density * bell;  // a φ(a)
        value = ::fmaxf(x, 0.0f) - a * tail;
        slope = x > 0 ? 1.0f - tail + along : tail - along;
    }
    float value, slope;
};

/// y = gelu(x) for `size` numbers; y may be x.
template <typename T>
__global__ void gelu(T* y, const T* x, Index size, bool packed) {
    for_each_pack<pack_size<T>>(size, packed, [&](Index i, auto width) {
        auto pack = load_pack<width>(x + i);
        for (T& value : pack.values) value = static_cast<T>(Gelu<T>(static_cast<accumulate_t<T>>(value)).value);
        store_pack(y + i, pack);
    });
}
template <typename T>
void launch_gelu(const Cuda& policy, T* y, const T* x, Index size) {
    constexpr int threads = 256;
    launch(policy, "gelu", gelu<T>, blocks_for(divide_up(size, pack_size<T>), threads), threads, 0, y, x, size,
           fits_packs<T>(0, y, x));
}

/// y = gelu(x), d_y ← d_y · gelu'(x), and what the rows of a block add to their sum; y may be x. One warp a row.
template <int width, int packs, typename T>
__global__ void __launch_bounds__(sum_threads)
    gelu_with_vjp(T* y, T* d_y, const T* x, Index d, accumulate_t<T>* partial, accumulate_t<T>* global, Index rows,
                  Index rows_each) {
    using Sum = accumulate_t<T>;
    const WarpSums<Sum> sums(global, d);
    LaneSums<Sum, 1, width, packs> lane_sums(sums.mine(), d);
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
                    lane_sums.add(0, i, j, e, static_cast<Sum>(d_in.values[e]));
                }
                store_pack(y + row * d + j, out);
                store_pack(d_y + row * d + j, d_in);
            },
            d_out);
    }
    lane_sums.flush();
    sums.write(partial);
}

/// The launch of the fused kernel, and a kernel for the rows that it leaves out.
namespace fused {

/// Computes the rows of the list one by one, with a block for each.
template <typename T>
__global__ void __launch_bounds__(hidden)
    recompute_rows(RowList list, T* y, T* pre_activation, const T* x, const T* gamma, const bool* mask,
                   const T* hidden_weight, const T* hidden_bias, const T* project_weight, const T* project_bias,
                   const T* add) {
    __shared__ float normed[dim], h[hidden];
    const int thread = static_cast<int>(threadIdx.x), warp = thread / warp_size, lane = thread % warp_size;
    for (unsigned i = blockIdx.x; i < *list.count; i += gridDim.x) {
        const Index row = list.rows[i];
        if (warp == 0) {
            const WarpRow<T, 8, 2> in(x + row * dim, dim, is_padding(mask, row));
            const RowScale<float> row_scale(in, dim);
            in.for_each([&](Index j, const auto& xs) {
                for (int e = 0; e < 8; ++e)
                    normed[j + e] = static_cast<float>(static_cast<T>(
                        row_scale.in_unit(xs.values[e]) * row_scale.scale * static_cast<float>(gamma[j + e])));
            });
        }
        __syncthreads();
        for (int j = warp; j < hidden; j += hidden / warp_size) {
            float sum = 0;
            for (int k = lane; k < dim; k += warp_size)
                sum += normed[k] * static_cast<float>(hidden_weight[j * dim + k]);
            const T value = static_cast<T>(warp_sum(sum) + static_cast<float>(hidden_bias[j]));
            if (lane == 0 && pre_activation != nullptr) pre_activation[row * hidden + j] = value;
            if (lane == 0) h[j] = static_cast<float>(static_cast<T>(Gelu<T>(static_cast<float>(value)).value));
        }
        __syncthreads();
        for (int j = warp; j < dim; j += hidden / warp_size) {
            float sum = 0;
            for (int k = lane; k < hidden; k += warp_size)
                sum += h[k] * static_cast<float>(project_weight[j * hidden + k]);
            sum = warp_sum(sum) + static_cast<float>(project_bias[j]);
            if (add != nullptr) sum += static_cast<float>(add[row * dim + j]);
            if (lane == 0) y[row * dim + j] = static_cast<T>(sum);
        }
        __syncthreads();
    }
}

/// Whether the kernel supports these shapes, addresses and this device. The number of tokens makes no difference.
template <typename T>
bool supports(const Cuda& policy, TokensView<T> y, TokensView<T> pre_activation, TokensView<const T> x,
              const FeedForwardParameters<const T>& parameters, TokensView<const T> add) {
    if (x.extent(2) != dim || parameters.hidden_weight.extent(0) != hidden ||
        !fits_packs<T>(dim, y.data(), pre_activation.data(), x.data(), add.data(), parameters.norm.gamma.data(),
                       parameters.hidden_weight.data(), parameters.hidden_bias.data(), parameters.project_weight.data(),
                       parameters.project_bias.data()))
        return false;
    return hopper::runs_on(policy, feed_forward<T>, threads);
}

template <typename T>
void launch_feed_forward(const Cuda& policy, TokensView<T> y, TokensView<T> pre_activation, TokensView<const T> x,
                         const FeedForwardParameters<const T>& parameters, TokensView<const T> add) {
    const Index rows = x.extent(0) * x.extent(1), tiles = divide_up(rows, Index{tile_rows});
    if (rows == 0) return;
    const DeviceGuard guard(policy.device());  // of tensor_map, too
    const auto& [norm, hidden_weight, hidden_bias, project_weight, project_bias] = parameters;
    VectorTensor<T, Cuda> weights(policy, {2 * hidden * dim});
    VectorTensor<int, Cuda> list(policy, {1 + rows});
    const RowList to_recompute{reinterpret_cast<unsigned*>(list.data()), list.data() + 1};
    constexpr int layout_threads = 256;
    launch(policy, "lay_out_weights", lay_out_weights<T>, grid(divide_up(2 * hidden * dim / 8, layout_threads)),
           layout_threads, 0, weights.data(), to_recompute, hidden_weight.data(), norm.gamma.data(),
           project_weight.data());
    const Index processors = multiprocessors(policy);
    launch(policy, "feed_forward", feed_forward<T>, grid(std::min(tiles, processors)), threads, shared_bytes,
           hopper::tensor_map<T, 2>(x.data(), {dim, rows}, {dim}, tile_rows), y.data(),
           static_cast<const T*>(weights.data()), hidden_bias.data(), project_bias.data(), pre_activation.data(),
           add.data(), to_recompute, rows, static_cast<int>(tiles));
    launch(policy, "recompute_rows", recompute_rows<T>, grid(std::min(rows, processors)), hidden, 0, to_recompute,
           y.data(), pre_activation.data(), x.data(), norm.gamma.data(), norm.clean_mask.data(), hidden_weight.data(),
           hidden_bias.data(), project_weight.data(), project_bias.data(), add.data());
}

}  // namespace fused

}  // namespace cuda

/// In 16 bits one fused kernel where that takes the sizes at hand; otherwise norm, product, GELU and product.
template <typename T>
void feed_forward_kernel(const Cuda& policy, TokensView<T> y, TokensView<T> pre_activation, TokensView<const T> x,
                         const FeedForwardParameters<const T>& parameters, TokensView<const T> add) {
    if constexpr (HalfPrecision<T>)
        if (cuda::fused::supports(policy, y, pre_activation, x, parameters, add))
            return cuda::fused::launch_feed_forward(policy, y, pre_activation, x, parameters, add);
    const auto& [norm, hidden_weight, hidden_bias, project_weight, project_bias] = parameters;
    const Index batch = x.extent(0), length = x.extent(1), d = x.extent(2), hidden = hidden_weight.extent(0);
    TokensTensor<T, Cuda> h(policy, {batch, length, hidden});
    if (!pre_activation) pre_activation = h.view();
    const auto before_gelu = cuda::token_matrices(pre_activation.data(), length, hidden);
    {
        auto normed = tensor_like(policy, x);  // (b, n, d)
        rms_norm_kernel(policy, normed.view().rows(), x.rows(), norm);
        cuda::matmul<T>(policy, length, hidden, d, before_gelu, cuda::token_matrices<const T>(normed.data(), length, d),
                        {hidden_weight.data(), d, true}, hidden_bias.data(), nullptr, batch);  // (b, n, h)
    }
    cuda::launch_gelu<T>(policy, h.data(), pre_activation.data(), h.size());
    cuda::matmul<T>(policy, length, d, hidden, cuda::token_matrices(y.data(), length, d),
                    cuda::token_matrices<const T>(h.data(), length, hidden), {project_weight.data(), hidden, true},
                    project_bias.data(), add.data(), batch);  // (b, n, d)
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
    cuda::linear_input_gradient<T>(policy, length, hidden, d, cuda::token_matrices(d_h.data(), length, hidden),
                                   cuda::token_matrices<const T>(d_y.data(), length, d),
                                   parameters.project_weight.data(), batch);
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
    cuda::linear_input_gradient<T>(policy, length, d, hidden, cuda::token_matrices(normed.data(), length, d),
                                   cuda::token_matrices<const T>(d_h.data(), length, hidden),
                                   parameters.hidden_weight.data(),
                                   batch);  // normed is not read any more
    rms_norm_vjp_kernel(policy, d_x, gradients.norm, normed.const_view(), x, parameters.norm, epilogue);
}

}  // namespace colt5
