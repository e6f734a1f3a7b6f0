// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <type_traits>

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/windows.hpp>

namespace colt5 {

namespace cuda {

inline constexpr int window_threads = 256;
inline constexpr Index window_elements = 8 * window_threads;  // of a row of the map that a block takes
inline constexpr int window_tile = 32;                        // side of a tile that a block transposes

/// A row of a map, of which each block takes a part. Token x of the row is token_at(x) of all sequences.
struct MapRow {
    Index b, y;
    Index first_token;
    std::int32_t side;

    __device__ MapRow(unsigned row, Index height, const WindowGrid& grid)
        : b(quotient(row, height)),
          y(row - b * height),
          first_token(b * grid.tokens() + grid.token_at(y, 0)),
          side(static_cast<std::int32_t>(grid.side)) {}
    __device__ Index token_at(Index x) const {
        const auto column = static_cast<std::int32_t>(x), window = column / side;
        return first_token + (static_cast<Index>(window) * side - window) * side + column;
    }
};

/// Between maps (b, h, w, d) and tokens, in packs: to the tokens, with zeros in the padding, or to the maps.
template <bool to_tokens, typename Pack>
__global__ void copy_windows(Pack* to, const Pack* from, WindowGrid grid, Index height, Index width, Index columns,
                             Index blocks_each) {
    const RowBlock at(blocks_each);
    const MapRow row(at.row, height, grid);
    const Index map_row = (row.b * grid.height + row.y) * grid.width;
    const Index begin = at.block * window_elements, end = ::min(width * columns, begin + window_elements);
    for (Index i = begin + threadIdx.x; i < end; i += window_threads) {
        const Index x = quotient(i, columns), column = i - x * columns;
        const Index of_token = row.token_at(x) * columns + column, of_map = (map_row + x) * columns + column;
        if constexpr (to_tokens)
            to[of_token] = grid.contains({row.y, x}) ? from[of_map] : Pack{};
        else
            to[of_map] = from[of_token];
    }
}

/// The same for maps (b, d, h, w): a block transposes a tile of a row, through shared memory.
template <bool to_tokens, typename T>
__global__ void __launch_bounds__(window_threads)
    transpose_windows(T* to, const T* from, WindowGrid grid, Index height, Index width, Index dim, Index blocks_each) {
    __shared__ T tile[window_tile][window_tile + 1];
    constexpr int step = window_threads / window_tile;
    const RowBlock at(blocks_each);
    const MapRow row(at.row, height, grid);
    const Index channel_tiles = divide_up(dim, window_tile), x_tile = quotient(at.block, channel_tiles);
    const Index first_x = x_tile * window_tile, first_channel = (at.block - x_tile * channel_tiles) * window_tile;
    const int lane = static_cast<int>(threadIdx.x) % window_tile, group = static_cast<int>(threadIdx.x) / window_tile;
    const auto map_at = [&](Index channel, Index x) {
        return ((row.b * dim + channel) * grid.height + row.y) * grid.width + x;
    };
    const auto token_at = [&](Index channel, Index x) { return row.token_at(x) * dim + channel; };
    for (int i = group; i < window_tile; i += step) {  // lanes follow `from`
        const Index x = first_x + (to_tokens ? lane : i), channel = first_channel + (to_tokens ? i : lane);
        if (channel >= dim || x >= width) continue;
        if constexpr (to_tokens)
            tile[i][lane] = grid.contains({row.y, x}) ? from[map_at(channel, x)] : T(0);
        else
            tile[i][lane] = from[token_at(channel, x)];
    }
    __syncthreads();
    for (int i = group; i < window_tile; i += step) {  // and here `to`
        const Index x = first_x + (to_tokens ? i : lane), channel = first_channel + (to_tokens ? lane : i);
        if (channel >= dim || x >= width) continue;
        if constexpr (to_tokens)
            to[token_at(channel, x)] = tile[lane][i];
        else
            to[map_at(channel, x)] = tile[lane][i];
    }
}

template <bool to_tokens, typename T>
void launch_windows(const Cuda& policy, T* to, const T* from, Index batch, Index dim, const WindowGrid& grid,
                    bool channel_first) {
    const Index height = to_tokens ? grid.rows() * grid.side : grid.height;
    const Index width = to_tokens ? grid.columns() * grid.side : grid.width;
    if (channel_first) {
        const Index blocks = divide_up(width, window_tile) * divide_up(dim, window_tile);
        launch(policy, "transpose_windows", transpose_windows<to_tokens, T>, grid_of_rows(batch * height, blocks),
               window_threads, 0, to, from, grid, height, width, dim, blocks);
        return;
    }
    const auto start = [&](auto* packs_to, const auto* packs_from, Index columns) {
        using Element = std::remove_pointer_t<decltype(packs_to)>;
        const Index blocks = divide_up(width * columns, window_elements);
        launch(policy, "copy_windows", copy_windows<to_tokens, Element>, grid_of_rows(batch * height, blocks),
               window_threads, 0, packs_to, packs_from, grid, height, width, columns, blocks);
    };
    if (fits_packs<T>(dim, to, from)) {
        using Packs = Pack<T, pack_size<T>>;
        start(reinterpret_cast<Packs*>(to), reinterpret_cast<const Packs*>(from), dim / pack_size<T>);
    } else {
        start(to, from, dim);
    }
}

template <typename Bool>
__global__ void mask_windows(Bool* out, const Bool* mask, WindowGrid grid, Index count) {
    for (Index i = global_thread(); i < count; i += grid_threads()) {
        const Index b = quotient(i, grid.tokens());
        const MapPosition at = grid.position(i - b * grid.tokens());
        out[i] = grid.contains(at) && (mask == nullptr || mask[(b * grid.height + at.y) * grid.width + at.x]);
    }
}

}  // namespace cuda

template <typename T>
void windows_kernel(const Cuda& policy, TokensView<T> tokens, MapView<const T> maps, const WindowGrid& grid,
                    bool channel_first) {
    cuda::launch_windows<true>(policy, tokens.data(), maps.data(), tokens.extent(0), tokens.extent(2), grid,
                               channel_first);
}
template <typename T>
void windows_kernel(const Cuda& policy, MapView<T> maps, TokensView<const T> tokens, const WindowGrid& grid,
                    bool channel_first) {
    cuda::launch_windows<false>(policy, maps.data(), tokens.data(), tokens.extent(0), tokens.extent(2), grid,
                                channel_first);
}

template <std::same_as<bool> Bool>
void window_mask_kernel(const Cuda& policy, View<Bool, dynamic, dynamic> out, MapMask mask, const WindowGrid& grid) {
    constexpr int threads = 256;
    cuda::launch(policy, "mask_windows", cuda::mask_windows<bool>, cuda::blocks_for(out.size(), threads), threads, 0,
                 out.data(), mask.data(), grid, out.size());
}

}  // namespace colt5
