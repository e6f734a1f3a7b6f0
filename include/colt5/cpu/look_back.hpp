// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <functional>

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

template <std::same_as<TokenIndex> Integer>
void look_back_counts_kernel(const Cpu&, TokensView<Integer> counts, Index windows) {
    const Index window = counts.extent(2);
    for (Index i = 0; i < counts.extent(0); ++i)
        for (Index j = 0; j < window; ++j)
            counts(i, 0, j) = static_cast<TokenIndex>((i % windows == 0 ? 0 : window) + j + 1);
}

template <typename T>
void window_keys_kernel(const Cpu& policy, TokensView<TokenIndex> indices, TokensView<T> scores, TokensView<bool> mask,
                        TokensView<const TokenIndex> picks, TokensView<const T> pick_scores, Index windows,
                        Index window, Index first, Index null) {
    parallel_for(policy, indices.extent(0), [&](Index i) {
        const Index before = (first + i) % windows * window;
        indices(i, 0, 0) = static_cast<TokenIndex>(null);
        scores(i, 0, 0) = T(1);
        mask(i, 0, 0) = true;
        for (Index j = 0; j < picks.extent(2); ++j) {
            indices(i, 0, j + 1) = picks(i, 0, j);
            scores(i, 0, j + 1) = pick_scores(i, 0, j);
            mask(i, 0, j + 1) = picks(i, 0, j) < before;
        }
    });
}

template <typename T>
void window_keys_vjp_kernel(const Cpu&, TokensView<T> d, TokensView<const T> d_scores) {
    for (Index i = 0; i < d.extent(0); ++i) std::copy_n(d_scores[i].data() + 1, d.extent(2), d[i].data());
}

template <typename T>
void window_prefixes_kernel(const Cpu& policy, TokensView<T> rows, View<bool, dynamic, dynamic> mask,
                            MatrixView<const T> logits, Index window, Index first) {
    const Index length = logits.extent(1), windows = length / window;
    parallel_for(policy, rows.extent(0), [&](Index i) {
        const Index row = first + i, before = row % windows * window;
        std::copy_n(logits[row / windows].data(), length, rows[i].data());
        std::fill_n(mask[i].data(), before, true);
        std::fill_n(mask[i].data() + before, length - before, false);
    });
}

template <typename T>
void window_prefixes_vjp_kernel(const Cpu& policy, MatrixView<T> d_logits, TokensView<const T> d_rows, Index window,
                                Index first) {
    const Index length = d_logits.extent(1), windows = length / window, rows = d_rows.extent(0);
    constexpr Index columns = 1024;  // of a task
    const Index blocks = divide_up(length, columns);
    parallel_for(policy, d_logits.extent(0) * blocks, [&](Index task) {
        const Index s = task / blocks, at = task % blocks * columns, count = std::min(columns, length - at);
        T* const to = d_logits[s].data() + at;
        const Index end = std::min(rows, (s + 1) * windows - first);
        for (Index i = std::max(Index{0}, s * windows - first); i < end; ++i) {
            const T* const from = d_rows[i].data() + at;
            std::transform(to, to + count, from, to, std::plus<T>());
        }
    });
}

}  // namespace colt5
