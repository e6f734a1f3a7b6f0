// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>

#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/map_tokens.hpp>

namespace colt5 {

template <typename T>
void add_sincos_positions_kernel(const Cpu& policy, TokensView<T> tokens, const WindowGrid& grid) {
    const Index half = tokens.extent(2) / 2, quarter = half / 2;
    const Index places = std::max(grid.rows(), grid.columns()) * grid.side;
    MatrixTensor<T, Cpu> of_place(policy, {places, half});  // sines, then cosines
    parallel_for(policy, places, [&](Index place) {
        for (Index c = 0; c < quarter; ++c) {
            const double angle = static_cast<double>(place) * detail::sincos_frequency(c, quarter);
            of_place.view()(place, c) = static_cast<T>(std::sin(angle));
            of_place.view()(place, quarter + c) = static_cast<T>(std::cos(angle));
        }
    });
    const auto rows = tokens.rows();
    cpu::for_each_row_chunk(policy, rows.extent(0), [&](Index, Index begin, Index end) {
        for (Index row = begin; row < end; ++row) {
            const auto [y, x] = grid.position(row % tokens.extent(1));
            cpu::add_row(rows[row].data(), of_place.view()[x].data(), half);
            cpu::add_row(rows[row].data() + half, of_place.view()[y].data(), half);
        }
    });
}

template <typename T>
void map_mean_kernel(const Cpu& policy, TokensView<T> mean, TokensView<const T> tokens, const WindowGrid& grid) {
    constexpr Index block = 64;  // columns of a task
    const Index dim = tokens.extent(2), blocks = divide_up(dim, block);
    const T scale = 1 / static_cast<T>(grid.height * grid.width);
    parallel_for(policy, tokens.extent(0) * blocks, [&](Index task) {
        const Index b = task / blocks, first = task % blocks * block, count = std::min(block, dim - first);
        T* const out = mean[b].data() + first;
        std::fill_n(out, count, T(0));
        for (Index i = 0; i < tokens.extent(1); ++i)
            if (grid.contains(grid.position(i))) cpu::add_row(out, tokens[b][i].data() + first, count);
        cpu::scale_row(out, count, scale);
    });
}

template <typename T>
void map_mean_vjp_kernel(const Cpu& policy, TokensView<T> d_tokens, TokensView<const T> d_mean,
                         const WindowGrid& grid) {
    const auto rows = d_tokens.rows();
    const Index dim = rows.extent(1);
    const T scale = 1 / static_cast<T>(grid.height * grid.width);
    cpu::for_each_row_chunk(policy, rows.extent(0), [&](Index, Index begin, Index end) {
        for (Index row = begin; row < end; ++row) {
            T* const to = rows[row].data();
            if (grid.contains(grid.position(row % d_tokens.extent(1)))) {
                std::copy_n(d_mean[row / d_tokens.extent(1)].data(), dim, to);
                cpu::scale_row(to, dim, scale);
            } else {
                std::fill_n(to, dim, T(0));
            }
        }
    });
}

}  // namespace colt5
