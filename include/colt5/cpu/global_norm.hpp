// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/global_norm.hpp>

namespace colt5 {

namespace cpu {

/// Elements of one task of the kernels below.
inline constexpr Index norm_piece = Index{1} << 14;

template <typename T>
double sum_of_squares(const T* x, Index size, double scale) {
    Batch<double> sum(0.0);
    for_each_batch<double>(size, [&](Index offset, Index count) {
        detail::Lanes<double> wide{};
        std::copy_n(x + offset, count, wide.values);
        const auto values = Batch<double>::load_aligned(wide.values) * Batch<double>(scale);
        sum = sum + values * values;
    });
    return reduce_add(sum);
}

}  // namespace cpu

/// One partial sum for each piece, added up in order.
template <typename T>
double sum_of_squares_kernel(const Cpu& policy, VectorView<const T> x, double scale) {
    const Index size = x.size(), pieces = (size + cpu::norm_piece - 1) / cpu::norm_piece;
    VectorTensor<double, Cpu> partial(policy, {pieces});
    parallel_for(policy, pieces, [&](Index i) {
        const Index first = i * cpu::norm_piece;
        partial.data()[i] = cpu::sum_of_squares(x.data() + first, std::min(cpu::norm_piece, size - first), scale);
    });
    double sum = 0;
    for (Index i = 0; i < pieces; ++i) sum += partial.data()[i];
    return sum;
}

template <typename T>
void scale_kernel(const Cpu& policy, VectorView<T> x, double factor) {
    const Index size = x.size();
    const cpu::Batch<T> factors(static_cast<T>(factor));
    parallel_for(policy, (size + cpu::norm_piece - 1) / cpu::norm_piece, [&](Index i) {
        const Index first = i * cpu::norm_piece;
        cpu::for_each_batch<T>(std::min(cpu::norm_piece, size - first), [&](Index offset, Index count) {
            T* const at = x.data() + first + offset;
            cpu::store(at, factors * cpu::load(at, count), count);
        });
    });
}

}  // namespace colt5
