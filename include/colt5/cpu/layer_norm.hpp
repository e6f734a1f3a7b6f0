// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include <colt5/core/norm.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/partial_sums.hpp>
#include <colt5/cpu/rms_norm.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/layer_norm.hpp>

namespace colt5 {

namespace cpu {

/// Mean and 1 / √(σ² + ε) of a row. Where its squares overflow they are those of `x`, the row times `unit`.
template <typename T>
struct RowMoments {
    RowMoments(const T* row, Index d) : x(row) {
        if (std::isfinite(square_of_deviations(d))) return;
        x = scaled_row(row, d);
        unit = scale_of_large<T>;
        square_of_deviations(d);
    }
    const T* x;
    T unit = 1, mean = 0, inverse_deviation = 0;

private:
    T square_of_deviations(Index d) {
        Batch<T> sum(T(0));
        for_each_batch<T>(d, [&](Index j, Index width) { sum += load(x + j, width); });
        mean = reduce_add(sum) / static_cast<T>(d);
        // The rounding of the mean would be the deviation of a nearly constant row: both are corrected by the sum of
        // deviations, which is 0 but for it.
        Batch<T> rest(T(0)), squares(T(0));
        const auto add = [&](const Batch<T>& value) {
            rest += value;
            squares = xsimd::fma(value, value, squares);
        };
        const Index whole = d / lanes<T> * lanes<T>;
        for (Index j = 0; j < whole; j += lanes<T>) add(load(x + j) - Batch<T>(mean));
        if (whole < d) add(pad(load_partial(x + whole, d - whole) - Batch<T>(mean), d - whole, T(0)));
        const T sum_of_rest = reduce_add(rest), correction = sum_of_rest / static_cast<T>(d);
        mean += correction;
        const T corrected = reduce_add(squares) - sum_of_rest * correction,
                square = corrected < T(0) ? T(0) : corrected;
        const T eps = std::max(static_cast<T>(layer_norm_eps) * unit * unit, std::numeric_limits<T>::min());
        inverse_deviation = T(1) / std::sqrt(square / static_cast<T>(d) + eps);
        return square;
    }
};

/// y = the norm of `rows` rows, on the calling thread
template <typename T>
void normalize_rows(const LayerNormParameters<const T>& norm, const T* x, Index rows, T* y) {
    const Index d = norm.weight.size();
    for (Index i = 0; i < rows; ++i, x += d, y += d) {
        const RowMoments<T> row(x, d);
        for_each_batch<T>(d, [&](Index j, Index width) {
            const Batch<T> z = (load(row.x + j, width) - Batch<T>(row.mean)) * Batch<T>(row.inverse_deviation);
            const Batch<T> weight = load(norm.weight.data() + j, width), bias = load(norm.bias.data() + j, width);
            store(y + j, xsimd::fma(z, weight, bias), width);
        });
    }
}

/// d_x = the gradient of x, plus `add` if there is one; the sums of d_weight and d_bias grow.
template <typename T>
void normalize_rows_vjp(const LayerNormParameters<const T>& norm, T* d_x, std::array<T*, 2> d_norm, const T* d_y,
                        const T* x, Index rows, const T* add) {
    const Index d = norm.weight.size();
    const T* const weight = norm.weight.data();
    for (Index i = 0; i < rows; ++i) {
        const RowMoments<T> row(x + i * d, d);
        const T *const in = row.x, *const g = d_y + i * d;
        const Batch<T> mean(row.mean), inverse(row.inverse_deviation), slope(row.inverse_deviation * row.unit);
        Batch<T> h_sum(T(0)), hz_sum(T(0));  // of the padded lanes h is 0
        for_each_batch<T>(d, [&](Index j, Index width) {
            const Batch<T> dy = load(g + j, width);
            Batch<T> z = (load(in + j, width) - mean) * inverse;
            if (width < lanes<T>) z = pad(z, width, T(0));  // or it may be infinite there
            const Batch<T> h = dy * load(weight + j, width);
            h_sum += h;
            hz_sum = xsimd::fma(h, z, hz_sum);
            store(d_norm[0] + j, xsimd::fma(dy, z, load(d_norm[0] + j, width)), width);
            store(d_norm[1] + j, load(d_norm[1] + j, width) + dy, width);
        });
        const Batch<T> h_mean(reduce_add(h_sum) / static_cast<T>(d)), hz_mean(reduce_add(hz_sum) / static_cast<T>(d));
        for_each_batch<T>(d, [&](Index j, Index width) {
            const Batch<T> z = (load(in + j, width) - mean) * inverse;
            const Batch<T> h = load(g + j, width) * load(weight + j, width);
            Batch<T> gradient = slope * (h - h_mean - z * hz_mean);
            if (add != nullptr) gradient += load(add + i * d + j, width);
            store(d_x + i * d + j, gradient, width);
        });
    }
}

}  // namespace cpu

template <typename T>
void layer_norm_kernel(const Cpu& policy, MatrixView<T> y, MatrixView<const T> x,
                       const LayerNormParameters<const T>& norm) {
    cpu::for_each_row_chunk(policy, x.extent(0), [&](Index, Index begin, Index end) {
        cpu::normalize_rows(norm, x[begin].data(), end - begin, y[begin].data());
    });
}

template <typename T>
void layer_norm_vjp_kernel(const Cpu& policy, TokensView<T> d_x, const LayerNormParameters<T>& d_norm,
                           TokensView<const T> d_y, TokensView<const T> x, const LayerNormParameters<const T>& norm,
                           const GradientEpilogue<T, Cpu>& epilogue) {
    const Index rows = x.extent(0) * x.extent(1), d = x.extent(2);
    cpu::PartialSums<T, LayerNormParameters<T>::count> sums(policy, cpu::row_chunks(rows), d);
    cpu::for_each_row_chunk(policy, rows, [&](Index chunk, Index begin, Index end) {
        cpu::normalize_rows_vjp<T>(norm, d_x.data() + begin * d, sums[chunk], d_y.data() + begin * d,
                                   x.data() + begin * d, end - begin, epilogue.d_residual_from(begin * d));
    });
    sums.add_to(d_norm.all());
}

}  // namespace colt5
