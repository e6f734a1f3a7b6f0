// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/core/norm.hpp>
#include <colt5/cuda/column_sums.cuh>
#include <colt5/cuda/gradient_epilogue.cuh>
#include <colt5/cuda/kernel.cuh>
#include <colt5/op/rms_norm.hpp>

namespace colt5 {

namespace cuda {

/// `scale` = √d / max(‖x · unit‖, 1e-12 · unit) of a row, which one warp computes. `unit` is 1, or a small power of two
/// if the sum of squares overflows.
template <typename Sum>
struct RowScale {
    template <typename Row>
    __device__ RowScale(const Row& x, Index d) {
        square = sum_of_squares(x);
        if (!isfinite(square)) {
            unit = scale_of_large<Sum>;
            square = sum_of_squares(x);
        }
        const Sum norm = ::sqrt(square), floor = static_cast<Sum>(rms_norm_floor) * unit;
        above_floor = !(norm <= floor);  // NaN stays NaN
        scale = ::sqrt(static_cast<Sum>(d)) / (above_floor ? norm : floor);
    }
    /// x · unit
    template <typename T>
    __device__ Sum in_unit(T x) const {
        return static_cast<Sum>(x) * unit;
    }
    Sum square, scale, unit = 1;
    bool above_floor;

private:
    template <typename Row>
    __device__ Sum sum_of_squares(const Row& x) const {
        Sum sum = 0;
        x.for_each([&](Index, const auto& in) {
            for (const auto value : in.values) sum += in_unit(value) * in_unit(value);
        });
        return warp_sum(sum);
    }
};

/// One warp for each row.
template <int width, int packs, typename T>
__global__ void rms_norm(T* y, const T* x, const T* gamma, const bool* mask, Index rows, Index d) {
    using Sum = accumulate_t<T>;
    for (Index row = global_thread() / warp_size; row < rows; row += grid_threads() / warp_size) {
        const WarpRow<T, width, packs> in(x + row * d, d, is_padding(mask, row));
        const RowScale<Sum> row_scale(in, d);
        in.for_each([&](Index j, const auto& xs) {
            const auto gammas = load_pack<width>(gamma + j);
            Pack<T, width> out;
            for (int e = 0; e < width; ++e)
                out.values[e] = static_cast<T>(row_scale.in_unit(xs.values[e]) * row_scale.scale *
                                               static_cast<Sum>(gammas.values[e]));
            store_pack(y + row * d + j, out);
        });
    }
}

/// Writes d_x with its epilogue. Each block writes its partial sums of d_gamma and of each d_t.
template <int width, int packs, int updates, typename T>
__global__ void __launch_bounds__(sum_threads)
    rms_norm_vjp(T* d_x, const T* d_y, const T* x, const T* gamma, const bool* mask,
                 const EpilogueTerms<T, updates> epilogue, Index d, accumulate_t<T>* partial, accumulate_t<T>* global,
                 Index rows, Index rows_each) {
    using Sum = accumulate_t<T>;
    const WarpSums<Sum> sums(global, (1 + updates) * d);
    LaneSums<Sum, 1 + updates, width, packs> lane_sums(sums.mine(), d);
    const Index end = ::min(rows, (blockIdx.x + 1) * rows_each), warps = sum_threads / warp_size;
    for (Index row = blockIdx.x * rows_each + threadIdx.x / warp_size; row < end; row += warps) {
        const WarpRow<T, width, packs> in(x + row * d, d, is_padding(mask, row)), d_out(d_y + row * d, d);
        const WarpRow<T, width, packs> residual((epilogue.residual != nullptr ? epilogue.residual : x) + row * d, d);
        Sum s[epilogue.places];
        epilogue.load_s(s, row);
        const RowScale<Sum> row_scale(in, d);
        Sum product = 0;  // Σ (dy ∘ gamma) · x · unit
        in.for_each_with(
            [&](int i, Index j, const auto& xs, const auto& dys) {
                const auto gammas = load_pack<width>(gamma + j);
                for (int e = 0; e < width; ++e) {
                    const Sum along = row_scale.in_unit(xs.values[e]) * static_cast<Sum>(dys.values[e]);
                    product += along * static_cast<Sum>(gammas.values[e]);
                    lane_sums.add(0, i, j, e, along * row_scale.scale);
                    for (int r = 0; r < updates; ++r)
                        lane_sums.add(1 + r, i, j, e, s[r] * static_cast<Sum>(xs.values[e]));
                }
            },
            d_out);
        product = warp_sum(product);
        const Sum along_x = row_scale.above_floor ? product / row_scale.square : Sum(0);
        in.for_each_with(
            [&](int, Index j, const auto& xs, const auto& dys, const auto& residuals) {
                const auto gammas = load_pack<width>(gamma + j);
                Sum own[width];
                for (int e = 0; e < width; ++e) {
                    const Sum h = static_cast<Sum>(dys.values[e]) * static_cast<Sum>(gammas.values[e]);
                    own[e] = row_scale.scale * row_scale.unit * (h - row_scale.in_unit(xs.values[e]) * along_x);
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
void rms_norm_kernel(const Cuda& policy, MatrixView<T> y, MatrixView<const T> x,
                     const RMSNormParameters<const T>& norm) {
    constexpr int threads = 256;
    const Index rows = x.extent(0), d = x.extent(1);
    cuda::with_warp_row<T>(
        d,
        [&]<int width, int packs>() {
            cuda::launch(policy, "rms_norm", cuda::rms_norm<width, packs, T>,
                         cuda::blocks_for(rows * cuda::warp_size, threads), threads, 0, y.data(), x.data(),
                         norm.gamma.data(), norm.clean_mask.data(), rows, d);
        },
        y.data(), x.data(), norm.gamma.data());
}

template <typename T, std::size_t updates>
void rms_norm_vjp_kernel(const Cuda& policy, TokensView<T> d_x, const RMSNormParameters<accumulate_t<T>>& d_norm,
                         TokensView<const T> d_y, TokensView<const T> x, const RMSNormParameters<const T>& norm,
                         const GradientEpilogue<T, Cuda, updates>& epilogue) {
    const Index rows = x.extent(0) * x.extent(1), d = x.extent(2);
    const auto terms = cuda::epilogue_terms(epilogue, x.extent(1));
    cuda::Totals<accumulate_t<T>, 1 + static_cast<int>(updates)> totals{{d_norm.gamma.data()}, d};
    auto** to = totals.to + 1;
    for (const auto& update : epilogue.rank_one) *to++ = update.d_t.data();
    policy.wait_event(epilogue.ready);
    cuda::with_warp_row<T>(
        d,
        [&]<int width, int packs>() {
            cuda::launch_with_sums(
                policy, "rms_norm_vjp", cuda::rms_norm_vjp<width, packs, static_cast<int>(updates), T>, totals, rows,
                d_x.data(), d_y.data(), x.data(), norm.gamma.data(), norm.clean_mask.data(), terms, d);
        },
        d_x.data(), d_y.data(), x.data(), norm.gamma.data(), terms.residual, terms.update[0].t,
        terms.update[terms.places - 1].t);
}

}  // namespace colt5
