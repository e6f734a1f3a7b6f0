// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>

#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/partial_sums.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/rms_norm.hpp>

namespace colt5 {

template <typename T>
void rms_norm_kernel(const Cpu& policy, MatrixView<T> y, MatrixView<const T> x, VectorView<const T> gamma) {
    using cpu::load, cpu::store;
    const Index d = x.extent(1);
    cpu::for_each_row_chunk(policy, x.extent(0), [&](Index, Index begin, Index end) {
        for (Index i = begin; i < end; ++i) {
            const T* const in = x[i].data();
            T* const out = y[i].data();
            const T norm = std::max(std::sqrt(cpu::dot(in, in, d)), static_cast<T>(rms_norm_floor));
            const cpu::Batch<T> s(std::sqrt(static_cast<T>(d)) / norm);
            cpu::for_each_batch<T>(d, [&](Index j, Index width) {
                store(out + j, load(in + j, width) * s * load(gamma.data() + j, width), width);
            });
        }
    });
}

template <typename T>
void rms_norm_vjp_kernel(const Cpu& policy, MatrixView<T> d_x, VectorView<T> d_gamma, MatrixView<const T> d_y,
                         MatrixView<const T> x, VectorView<const T> gamma) {
    using cpu::load, cpu::store;
    using Batch = cpu::Batch<T>;
    const Index d = x.extent(1);
    cpu::PartialSums<T> sums(policy, x.extent(0), d);
    cpu::for_each_row_chunk(policy, x.extent(0), [&](Index chunk, Index begin, Index end) {
        T* const d_gamma_part = sums.part(chunk);
        for (Index i = begin; i < end; ++i) {
            const T *const in = x[i].data(), *const g = d_y[i].data();
            T* const out = d_x[i].data();
            Batch squares(T(0)), products(T(0));  // ‖x‖² and h·x
            cpu::for_each_batch<T>(d, [&](Index j, Index width) {
                const Batch v = load(in + j, width);
                squares = xsimd::fma(v, v, squares);
                products = xsimd::fma(v, load(g + j, width) * load(gamma.data() + j, width), products);
            });
            const T square = cpu::reduce_add(squares), norm = std::sqrt(square);
            const T s = std::sqrt(static_cast<T>(d)) / std::max(norm, static_cast<T>(rms_norm_floor));
            const bool above_floor = norm > static_cast<T>(rms_norm_floor);
            const T along_x = above_floor ? cpu::reduce_add(products) / square : T(0);
            cpu::for_each_batch<T>(d, [&](Index j, Index width) {
                const Batch v = load(in + j, width), dy = load(g + j, width);
                const Batch h = dy * load(gamma.data() + j, width);
                store(out + j, Batch(s) * (h - v * Batch(along_x)), width);
                store(d_gamma_part + j, xsimd::fma(dy * Batch(s), v, load(d_gamma_part + j, width)), width);
            });
        }
    });
    sums.add_to(d_gamma);
}

}  // namespace colt5
