// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

#include <colt5/core/norm.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/partial_sums.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/rms_norm.hpp>

namespace colt5 {

namespace cpu {

/// x times scale_of_large, in memory of the thread: a row whose squares overflow.
template <typename T>
const T* scaled_row(const T* x, Index d) {
    T* const scaled = thread_scratch<T, struct ScaledRow>(d);
    for_each_batch<T>(
        d, [&](Index j, Index width) { store(scaled + j, load(x + j, width) * Batch<T>(scale_of_large<T>), width); });
    return scaled;
}

/// y = the norm of `rows` rows, on the calling thread
template <typename T>
void normalize_rows(const RMSNormParameters<const T>& norm, const T* x, Index rows, T* y) {
    const Index d = norm.gamma.size();
    for (Index i = 0; i < rows; ++i, x += d, y += d) {
        const T* in = x;
        T square = dot(in, in, d), floor = static_cast<T>(rms_norm_floor);
        if (!std::isfinite(square)) {
            in = scaled_row(x, d);
            floor *= scale_of_large<T>;
            square = dot(in, in, d);
        }
        const T length = std::max(std::sqrt(square), floor);
        const Batch<T> s(std::sqrt(static_cast<T>(d)) / length);
        for_each_batch<T>(d, [&](Index j, Index width) {
            store(y + j, load(in + j, width) * s * load(norm.gamma.data() + j, width), width);
        });
    }
}

/// d_x = the gradient of x, plus `add` if there is one; the sum of d_gamma grows.
template <typename T>
void normalize_rows_vjp(const RMSNormParameters<const T>& norm, T* d_x, std::array<T*, 1> d_norm, const T* d_y,
                        const T* x, Index rows, const T* add) {
    const Index d = norm.gamma.size();
    const T* const gamma = norm.gamma.data();
    for (Index i = 0; i < rows; ++i) {
        const T *in = x + i * d, *const g = d_y + i * d;
        T square = 0, product = 0, unit = 1;  // ‖x‖² and h·x, of x times `unit`
        const auto sum_up = [&] {
            Batch<T> squares(T(0)), products(T(0));
            for_each_batch<T>(d, [&](Index j, Index width) {
                const Batch<T> v = load(in + j, width);
                squares = xsimd::fma(v, v, squares);
                products = xsimd::fma(v, load(g + j, width) * load(gamma + j, width), products);
            });
            square = reduce_add(squares);
            product = reduce_add(products);
        };
        sum_up();
        if (!std::isfinite(square)) {
            in = scaled_row(in, d);
            unit = scale_of_large<T>;
            sum_up();
        }
        const T length = std::sqrt(square), floor = static_cast<T>(rms_norm_floor) * unit;
        const T s = std::sqrt(static_cast<T>(d)) / std::max(length, floor);
        const bool above_floor = length > floor;
        const T along_x = above_floor ? product / square : T(0);
        for_each_batch<T>(d, [&](Index j, Index width) {
            const Batch<T> v = load(in + j, width), dy = load(g + j, width);
            const Batch<T> h = dy * load(gamma + j, width);
            Batch<T> gradient = Batch<T>(s * unit) * (h - v * Batch<T>(along_x));
            if (add != nullptr) gradient += load(add + i * d + j, width);
            store(d_x + i * d + j, gradient, width);
            store(d_norm[0] + j, xsimd::fma(dy * Batch<T>(s), v, load(d_norm[0] + j, width)), width);
        });
    }
}

}  // namespace cpu

template <typename T>
void rms_norm_kernel(const Cpu& policy, MatrixView<T> y, MatrixView<const T> x,
                     const RMSNormParameters<const T>& norm) {
    cpu::for_each_row_chunk(policy, x.extent(0), [&](Index, Index begin, Index end) {
        cpu::normalize_rows(norm, x[begin].data(), end - begin, y[begin].data());
    });
}

template <typename T>
void rms_norm_vjp_kernel(const Cpu& policy, TokensView<T> d_x, const RMSNormParameters<T>& d_norm,
                         TokensView<const T> d_y, TokensView<const T> x, const RMSNormParameters<const T>& norm,
                         const GradientEpilogue<T, Cpu>& epilogue) {
    const Index rows = x.extent(0) * x.extent(1), d = x.extent(2);
    cpu::PartialSums<T, RMSNormParameters<T>::count> sums(policy, cpu::row_chunks(rows), d);
    cpu::for_each_row_chunk(policy, rows, [&](Index chunk, Index begin, Index end) {
        cpu::normalize_rows_vjp<T>(norm, d_x.data() + begin * d, sums[chunk], d_y.data() + begin * d,
                                   x.data() + begin * d, end - begin, epilogue.d_residual_from(begin * d));
    });
    sums.add_to(d_norm.all());
}

}  // namespace colt5
