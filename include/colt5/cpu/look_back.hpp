// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/look_back.hpp>

namespace colt5 {

template <typename T>
void look_back_kernel(const Cpu& policy, TokensView<T> rows, TokensView<const T> x, Index window) {
    const Index windows = x.extent(1) / window, of_window = window * x.extent(2);
    parallel_for(policy, rows.extent(0), [&](Index i) {
        const T* const own = x.data() + i * of_window;
        T* const to = rows.data() + 2 * i * of_window;
        if (i % windows == 0) {
            std::copy_n(own, of_window, to);
            std::fill_n(to + of_window, of_window, T(0));
        } else {
            std::copy_n(own - of_window, 2 * of_window, to);
        }
    });
}

template <typename T>
void look_back_vjp_kernel(const Cpu& policy, TokensView<T> d_x, TokensView<const T> d_rows, Index window) {
    const Index windows = d_x.extent(1) / window, of_window = window * d_x.extent(2);
    parallel_for(policy, d_rows.extent(0), [&](Index i) {
        T* const to = d_x.data() + i * of_window;
        const T* const own = d_rows.data() + (2 * i + (i % windows == 0 ? 0 : 1)) * of_window;
        std::copy_n(own, of_window, to);
        if (i % windows + 1 < windows) cpu::add_row(to, d_rows.data() + 2 * (i + 1) * of_window, of_window);
    });
}

inline void look_back_counts_kernel(const Cpu&, TokensView<TokenIndex> counts, Index windows) {
    const Index window = counts.extent(2);
    for (Index i = 0; i < counts.extent(0); ++i)
        for (Index j = 0; j < window; ++j)
            counts(i, 0, j) = static_cast<TokenIndex>((i % windows == 0 ? 0 : window) + j + 1);
}

}  // namespace colt5
