// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/core/norm.hpp>
#include <colt5/cuda/column_sums.cuh>
#include <colt5/cuda/gradient_epilogue.cuh>
#include <colt5/cuda/kernel.cuh>
#include <colt5/op/layer_norm.hpp>

namespace colt5 {

namespace cuda {

/// Mean and 1 / √(σ² + ε) of a row, which one warp computes. They are those of x · unit, where `unit` is 1 unless
/// squares overflow.
template <typename Sum>
struct RowMoments {
    template <typename Row>
    __device__ RowMoments(const Row& x, Index d) {
        if (isfinite(square_of_deviations(x, d))) return;
        unit = scale_of_large<Sum>;
        square_of_deviations(x, d);
    }
    /// (x − μ) / √(σ² + ε)
    template <typename T>
    __device__ Sum normalized(T x) const {
        return (static_cast<Sum>(x) * unit - mean) * inverse;
    }
    Sum mean, inverse, unit = 1;

private:
    template <typename Row>
    __device__ Sum square_of_deviations(const Row& x, Index d) {
        Sum sum = 0, rest = 0, squares = 0;
        x.for_each([&](Index, const auto& in) {
            for (const auto value : in.values) sum += static_cast<Sum>(value) * unit;
        });
        mean = warp_sum(sum) / static_cast<Sum>(d);
        // The rounding of the mean would be the deviation of a nearly constant row: both are corrected by the sum of
        // deviations, which is 0 but for it.
        x.for_each([&](Index, const auto& in) {
            for (const auto value : in.values) {
                const Sum centered = static_cast<Sum>(value) * unit - mean;
                rest += centered;
                squares += centered * centered;
            }
        });
        rest = warp_sum(rest);
        const Sum correction = rest / static_cast<Sum>(d), corrected = warp_sum(squares) - rest * correction;
        mean += correction;
        squares = corrected < Sum(0) ? Sum(0) : corrected;
        const Sum eps = ::max(static_cast<Sum>(layer_norm_eps) * unit * unit, std::numeric_limits<Sum>::min());
        inverse = Sum(1) / ::sqrt(squares / static_cast<Sum>(d) + eps);
        return squares;
    }
};

/// One warp for each row.
template <int width, int packs, typename T>
__global__ void layer_norm(T* y, const T* x, const T* weight, const T* bias, const bool* mask, Index rows, Index d) {
    using Sum = accumulate_t<T>;
    for (Index row = global_thread() / warp_size; row < rows; row += grid_threads() / warp_size) {
        const WarpRow<T, width, packs> in(x + row * d, d, is_padding(mask, row));
        const RowMoments<Sum> moments(in, d);
        in.for_each([&](Index j, const auto& xs) {
            const auto weights = load_pack<width>(weight + j), biases = load_pack<width>(bias + j);
            Pack<T, width> out;
            for (int e = 0; e < width; ++e)
                out.values[e] = static_cast<T>(moments.normalized(xs.values[e]) * static_cast<Sum>(weights.values[e]) +
                                               static_cast<Sum>(biases.values[e]));
            store_pack(y + row * d + j, out);
        });
    }
}

/// Writes d_x with its epilogue. Each block writes its partial sums of d_weight, d_bias and of each d_t.
template <int width, int packs, int updates, typename T>
__global__ void __launch_bounds__(sum_threads, blocks_with_sums<T, (2 + updates) * packs * width>)
    layer_norm_vjp(T* d_x, const T* d_y, const T* x, const T* weight, const bool* mask,
                   const EpilogueTerms<T, updates> epilogue, Index d, accumulate_t<T>* partial, accumulate_t<T>* global,
                   Index rows, Index rows_each) {
    using Sum = accumulate_t<T>;
    const WarpSums<Sum> sums(global, (2 + updates) * d);
    LaneSums<Sum, 2 + updates, width, packs> lane_sums(sums.mine(), d);
    const Index end = ::min(rows, (blockIdx.x + 1) * rows_each), warps = sum_threads / warp_size;
    for (Index row = blockIdx.x * rows_each + threadIdx.x / warp_size; row < end; row += warps) {
        const WarpRow<T, width, packs> in(x + row * d, d, is_padding(mask, row)), d_out(d_y + row * d, d);
        const WarpRow<T, width, packs> residual((epilogue.residual != nullptr ? epilogue.residual : x) + row * d, d);
        Sum s[epilogue.places];
        epilogue.load_s(s, row);
        const RowMoments<Sum> moments(in, d);
        Sum h_sum = 0, hz_sum = 0;
        in.for_each_with(
            [&](int i, Index j, const auto& xs, const auto& dys) {
                const auto weights = load_pack<width>(weight + j);
                for (int e = 0; e < width; ++e) {
                    const Sum dy = static_cast<Sum>(dys.values[e]), z = moments.normalized(xs.values[e]);
                    const Sum h = dy * static_cast<Sum>(weights.values[e]);
                    h_sum += h;
                    hz_sum += h * z;
                    lane_sums.add(0, i, j, e, dy * z);
                    lane_sums.add(1, i, j, e, dy);
                    for (int r = 0; r < updates; ++r)
                        lane_sums.add(2 + r, i, j, e, s[r] * static_cast<Sum>(xs.values[e]));
                }
            },
            d_out);
        const Sum h_mean = warp_sum(h_sum) / static_cast<Sum>(d), hz_mean = warp_sum(hz_sum) / static_cast<Sum>(d);
        in.for_each_with(
            [&](int, Index j, const auto& xs, const auto& dys, const auto& residuals) {
                const auto weights = load_pack<width>(weight + j);
                Sum own[width];
                for (int e = 0; e < width; ++e) {
                    const Sum h = static_cast<Sum>(dys.values[e]) * static_cast<Sum>(weights.values[e]);
                    own[e] = moments.inverse * moments.unit * (h - h_mean - moments.normalized(xs.values[e]) * hz_mean);
                }
                store_pack(d_x + row * d + j, epilogue.total(own, residuals, s, j));
            },
            d_out, residual);
    }
    lane_sums.flush();
    sums.write(partial);
}

}  // namespace cuda

template <typename T>
void layer_norm_kernel(const Cuda& policy, MatrixView<T> y, MatrixView<const T> x,
                       const LayerNormParameters<const T>& norm) {
    constexpr int threads = 256;
    const Index rows = x.extent(0), d = x.extent(1);
    cuda::with_warp_row<T>(
        d,
        [&]<int width, int packs>() {
            cuda::launch(policy, "layer_norm", cuda::layer_norm<width, packs, T>,
                         cuda::blocks_for(rows * cuda::warp_size, threads), threads, 0, y.data(), x.data(),
                         norm.weight.data(), norm.bias.data(), norm.clean_mask.data(), rows, d);
        },
        y.data(), x.data(), norm.weight.data(), norm.bias.data());
}

template <typename T, std::size_t updates>
void layer_norm_vjp_kernel(const Cuda& policy, TokensView<T> d_x, const LayerNormParameters<accumulate_t<T>>& d_norm,
                           TokensView<const T> d_y, TokensView<const T> x, const LayerNormParameters<const T>& norm,
                           const GradientEpilogue<T, Cuda, updates>& epilogue) {
    const Index rows = x.extent(0) * x.extent(1), d = x.extent(2);
    const auto terms = cuda::epilogue_terms(epilogue, x.extent(1));
    cuda::Totals<accumulate_t<T>, 2 + static_cast<int>(updates)> totals{{d_norm.weight.data(), d_norm.bias.data()}, d};
    auto** to = totals.to + 2;
    for (const auto& update : epilogue.rank_one) *to++ = update.d_t.data();
    policy.wait_event(epilogue.ready);
    cuda::with_warp_row<T>(
        d,
        [&]<int width, int packs>() {
            cuda::launch_with_sums(
                policy, "layer_norm_vjp", cuda::layer_norm_vjp<width, packs, static_cast<int>(updates), T>, totals,
                rows, d_x.data(), d_y.data(), x.data(), norm.weight.data(), norm.clean_mask.data(), terms, d);
        },
        d_x.data(), d_y.data(), x.data(), norm.weight.data(), terms.residual, terms.update[0].t,
        terms.update[terms.places - 1].t);
}

}  // namespace colt5
