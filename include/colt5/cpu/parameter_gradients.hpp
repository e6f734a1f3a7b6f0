// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>

#include <colt5/core/tensor.hpp>
#include <colt5/cpu/gemm.hpp>
#include <colt5/cpu/layer_norm.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/rms_norm.hpp>
#include <colt5/cpu/simd.hpp>

/// Gradients of parameters, which grow by what a chunk of rows adds to them. Their bits do not depend on the number of
/// threads.
namespace colt5::cpu {

/// d_weight (out, in) += d_yᵀ · x for d_y (rows, out) and x (rows, in), which is packed. Threads share out the rows of
/// d_weight, each of which is summed up in the order of tokens.
template <typename T>
void add_weight_gradient(const Cpu& policy, T* d_weight, Index out, Index in, const T* d_y,
                         const PackedMatrix<Op::none, T>& x) {
    if (out == 0) return;
    constexpr Index unit = GemmTile<T>::rows, most = GemmTile<T>::panel_rows;
    const Index threads = uses_blas ? 1 : policy.threads();
    const Index tiles = divide_up(out, unit), blocks = std::min(tiles, divide_up(out, threads * most) * threads);
    parallel_for(policy, blocks, [&](Index block) {
        const Index first = tiles * block / blocks * unit, end = std::min(out, tiles * (block + 1) / blocks * unit);
        x.add_transposed(end - first, d_y + first, out, d_weight + first * in, in);
    });
}

/// sum += Σ of rows
template <typename T>
void add_rows(const T* rows, Index count, Index columns, T* sum) {
    for (Index i = 0; i < count; ++i) add_row(sum, rows + i * columns, columns);
}

/// One row of sums for each panel of a chunk, which are added up in order: gradients of parameters that all rows share.
template <typename T>
class PanelSums {
public:
    PanelSums(const Cpu& policy, Index panels, Index columns) : sums_(policy, {panels, columns}) {
        std::fill_n(sums_.data(), sums_.size(), T(0));
    }
    T* operator[](Index panel) { return sums_.data() + panel * sums_.extent(1); }

    /// total += the sums of columns from `first` on; an absent total is left alone.
    void add_to(VectorView<T> total, Index first = 0) const {
        for (Index panel = 0; panel < sums_.extent(0); ++panel)
            add_row(total.data(), sums_.data() + panel * sums_.extent(1) + first, total.size());
    }

private:
    MatrixTensor<T, Cpu> sums_;
};

/// The sums of a norm's parameters, which lie one after the other.
template <typename T, typename Norm>
class NormPanelSums {
public:
    NormPanelSums(const Cpu& policy, Index panels, Index dim)
        : dim_(dim), sums_(policy, panels, static_cast<Index>(Norm::count) * dim) {}

    /// d_x = the gradient of the norm for a panel, plus `add` if there is one.
    void normalize_vjp(Index panel, const Norm& norm, T* d_x, const T* d_y, const T* x, Index rows, const T* add) {
        std::array<T*, Norm::count> d_norm;
        for (std::size_t i = 0; i < Norm::count; ++i) d_norm[i] = sums_[panel] + static_cast<Index>(i) * dim_;
        normalize_rows_vjp(norm, d_x, d_norm, d_y, x, rows, add);
    }
    template <typename Gradients>
    void add_to(const Gradients& d_norm) const {
        Index first = 0;
        for (const auto& gradient : d_norm.all()) {
            sums_.add_to(gradient, first);
            first += dim_;
        }
    }

private:
    Index dim_;
    PanelSums<T> sums_;
};

}  // namespace colt5::cpu
