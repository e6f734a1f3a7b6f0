// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>

#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/partial_sums.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/layer_norm.hpp>

namespace colt5 {

namespace cpu {

template <typename T>
struct RowMoments {
    RowMoments(const T* x, Index d) {
        Batch<T> sum(T(0));
        for_each_batch<T>(d, [&](Index j, Index width) { sum += load(x + j, width); });
        mean = reduce_add(sum) / static_cast<T>(d);
        Batch<T> squares(T(0));
        for_each_batch<T>(d, [&](Index j, Index width) {
            Batch<T> centered = load(x + j, width) - Batch<T>(mean);
            if (width < lanes<T>) centered = pad(centered, width, T(0));
            squares = xsimd::fma(centered, centered, squares);
        });
        inverse_deviation = T(1) / std::sqrt(reduce_add(squares) / static_cast<T>(d) + static_cast<T>(layer_norm_eps));
    }
    T mean, inverse_deviation;
};

}  // namespace cpu

template <typename T>
void layer_norm_kernel(const Cpu& policy, MatrixView<T> y, MatrixView<const T> x, VectorView<const T> weight,
                       VectorView<const T> bias) {
    using cpu::load, cpu::store;
    using Batch = cpu::Batch<T>;
    const Index d = x.extent(1);
    cpu::for_each_row_chunk(policy, x.extent(0), [&](Index, Index begin, Index end) {
        for (Index i = begin; i < end; ++i) {
            const T* const in = x[i].data();
            T* const out = y[i].data();
            const cpu::RowMoments<T> row(in, d);
            cpu::for_each_batch<T>(d, [&](Index j, Index width) {
                const Batch z = (load(in + j, width) - Batch(row.mean)) * Batch(row.inverse_deviation);
                store(out + j, xsimd::fma(z, load(weight.data() + j, width), load(bias.data() + j, width)), width);
            });
        }
    });
}

template <typename T>
void layer_norm_vjp_kernel(const Cpu& policy, MatrixView<T> d_x, VectorView<T> d_weight, VectorView<T> d_bias,
                           MatrixView<const T> d_y, MatrixView<const T> x, VectorView<const T> weight) {
    using cpu::load, cpu::store;
    using Batch = cpu::Batch<T>;
    const Index d = x.extent(1);
    cpu::PartialSums<T> weight_sums(policy, x.extent(0), d), bias_sums(policy, x.extent(0), d);
    cpu::for_each_row_chunk(policy, x.extent(0), [&](Index chunk, Index begin, Index end) {
        T *const d_weight_part = weight_sums.part(chunk), *const d_bias_part = bias_sums.part(chunk);
        for (Index i = begin; i < end; ++i) {
            const T *const in = x[i].data(), *const g = d_y[i].data();
            T* const out = d_x[i].data();
            const cpu::RowMoments<T> row(in, d);
            const Batch mean(row.mean), inverse(row.inverse_deviation);
            Batch h_sum(T(0)), hz_sum(T(0));  // of the padded lanes h is 0
            cpu::for_each_batch<T>(d, [&](Index j, Index width) {
                const Batch dy = load(g + j, width), z = (load(in + j, width) - mean) * inverse;
                const Batch h = dy * load(weight.data() + j, width);
                h_sum += h;
                hz_sum = xsimd::fma(h, z, hz_sum);
                store(d_weight_part + j, xsimd::fma(dy, z, load(d_weight_part + j, width)), width);
                store(d_bias_part + j, load(d_bias_part + j, width) + dy, width);
            });
            const Batch h_mean(cpu::reduce_add(h_sum) / static_cast<T>(d));
            const Batch hz_mean(cpu::reduce_add(hz_sum) / static_cast<T>(d));
            cpu::for_each_batch<T>(d, [&](Index j, Index width) {
                const Batch z = (load(in + j, width) - mean) * inverse;
                const Batch h = load(g + j, width) * load(weight.data() + j, width);
                store(out + j, inverse * (h - h_mean - z * hz_mean), width);
            });
        }
    });
    weight_sums.add_to(d_weight);
    bias_sums.add_to(d_bias);
}

}  // namespace colt5
