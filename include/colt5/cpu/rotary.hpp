// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/rotary.hpp>

namespace colt5 {

namespace cpu {

/// sin and cos (pairs) of the angles of one position; `angles` is room for as many.
template <typename T>
void rotary_table(T* sin, T* cos, double* angles, double position, VectorView<const float> inv_freq) {
    const Index pairs = inv_freq.extent(0);
    for (Index i = 0; i < pairs; ++i)
        angles[i] = colt5::detail::rotary_angle(position, static_cast<double>(inv_freq(i)));
    for (Index i = 0; i < pairs; ++i) cos[i] = static_cast<T>(angles[i]);
    for_each_batch<T>(pairs, [&](Index i, Index width) {
        const auto [s, c] = cpu::sincos(load(cos + i, width));
        store(sin + i, s, width);
        store(cos + i, c, width);
    });
}

template <typename T>
void rotate_head(T* head, const T* sin, const T* cos, Index pairs, T sign) {
    for_each_batch<T>(pairs, [&](Index i, Index width) {
        const Batch<T> x = load(head + i, width), y = load(head + pairs + i, width);
        const Batch<T> c = load(cos + i, width), s = load(sin + i, width) * Batch<T>(sign);
        store(head + i, xsimd::fms(x, c, y * s), width);
        store(head + pairs + i, xsimd::fma(y, c, x * s), width);
    });
}

}  // namespace cpu

template <typename T>
void rotary_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic> x, Index heads,
                   VectorView<const float> inv_freq, const RowPositions& at, bool back) {
    // No structured binding: clang 16 with OpenMP does not capture them.
    const Index batch = x.extent(0), rows = x.extent(1), groups = x.extent(2), all_heads = x.extent(3),
                dim_head = x.extent(4), pairs = dim_head / 2;
    cpu::for_each_row_chunk(policy, batch * rows, [&](Index, Index begin, Index end) {
        T* const sin = cpu::thread_scratch<T, struct Sines>(2 * pairs);
        T* const cos = sin + pairs;
        double* const angles = cpu::thread_scratch<double, struct Angles>(pairs);
        for (Index row = begin; row < end; ++row) {
            const Index position = at.indices ? at.indices.data()[row] : at.first + row % rows;
            cpu::rotary_table(sin, cos, angles, static_cast<double>(position), inv_freq);
            for (Index group = 0; group < groups; ++group)
                for (Index h = 0; h < heads; ++h)
                    cpu::rotate_head(x.data() + ((row * groups + group) * all_heads + h) * dim_head, sin, cos, pairs,
                                     T(back ? -1 : 1));
        }
    });
}

}  // namespace colt5
