// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>

#include <colt5/cpu/parallel.hpp>
#include <colt5/op/windows.hpp>

namespace colt5 {

namespace cpu {

/// Calls run(b, y, x, count, token) for runs of tokens that follow each other in a row of the map, from (y, x) on, and
/// in the sequence, from `token` on. Runs end with windows. With `padding` they go on beyond the map.
template <typename Run>
void for_each_run(const Cpu& policy, Index batch, const WindowGrid& grid, bool padding, Run&& run) {
    const Index height = padding ? grid.rows() * grid.side : grid.height;
    const Index width = padding ? grid.columns() * grid.side : grid.width;
    parallel_for(policy, batch * height, [&](Index task) {
        const Index b = task / height, y = task % height;
        for (Index x = 0; x < width; x += grid.side) run(b, y, x, std::min(grid.side, width - x), grid.token_at(y, x));
    });
}

/// to[i · stride_to + j] = from[j · stride_from + i]  for i < rows, j < columns
template <typename T>
void copy_transposed(T* to, Index stride_to, const T* from, Index stride_from, Index rows, Index columns) {
    constexpr Index block = 16;  // a cache line of float
    for (Index first = 0; first < columns; first += block)
        for (Index i = 0; i < rows; ++i)
            for (Index j = first; j < std::min(columns, first + block); ++j)
                to[i * stride_to + j] = from[j * stride_from + i];
}

}  // namespace cpu

template <typename T>
void windows_kernel(const Cpu& policy, TokensView<T> tokens, MapView<const T> maps, const WindowGrid& grid,
                    bool channel_first) {
    const Index dim = tokens.extent(2), area = grid.height * grid.width;
    cpu::for_each_run(policy, tokens.extent(0), grid, true, [&](Index b, Index y, Index x, Index count, Index token) {
        T* const to = tokens[b].data() + token * dim;
        const T* const from = maps[b].data();
        const Index at = y * grid.width + x, real = y < grid.height ? std::min(grid.width - x, count) : 0;
        if (channel_first)
            cpu::copy_transposed(to, dim, from + at, area, real, dim);
        else if (real > 0)
            std::copy_n(from + at * dim, real * dim, to);
        std::fill_n(to + real * dim, (count - real) * dim, T(0));
    });
}

template <typename T>
void windows_kernel(const Cpu& policy, MapView<T> maps, TokensView<const T> tokens, const WindowGrid& grid,
                    bool channel_first) {
    const Index dim = tokens.extent(2), area = grid.height * grid.width;
    cpu::for_each_run(policy, tokens.extent(0), grid, false, [&](Index b, Index y, Index x, Index count, Index token) {
        const T* const from = tokens[b].data() + token * dim;
        T* const to = maps[b].data();
        const Index at = y * grid.width + x;
        if (channel_first)
            cpu::copy_transposed(to + at, area, from, dim, dim, count);
        else
            std::copy_n(from, count * dim, to + at * dim);
    });
}

template <std::same_as<bool> Bool>
void window_mask_kernel(const Cpu& policy, View<Bool, dynamic, dynamic> out, MapMask mask, const WindowGrid& grid) {
    cpu::for_each_run(policy, out.extent(0), grid, true, [&](Index b, Index y, Index x, Index count, Index token) {
        for (Index i = 0; i < count; ++i) out(b, token + i) = grid.contains({y, x + i}) && (!mask || mask(b, y, x + i));
    });
}

}  // namespace colt5
