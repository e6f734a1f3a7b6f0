// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <string_view>

#include <colt5/core/tensor.hpp>

namespace colt5 {

template <typename P>
void windows_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `windows` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void window_mask_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `window_mask` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// Mask of the tokens of maps (b, h, w): true marks a real token. A default-constructed one means that every token is
/// real.
using MapMask = View<const bool, dynamic, dynamic, dynamic>;
/// A batch of maps (b, h, w, d) or (b, d, h, w).
template <typename T>
using MapView = View<T, dynamic, dynamic, dynamic, dynamic>;
template <typename T, Policy P>
using MapTensor = Tensor<T, P, dynamic, dynamic, dynamic, dynamic>;

/// The place of a token in a map.
struct MapPosition {
    Index y, x;
    bool operator==(const MapPosition&) const = default;
};

/// A map of height × width tokens as a sequence: it is cut into square windows, which follow each other row by row, as
/// do the tokens in a window. At the right and at the bottom the map is padded to whole windows.
struct WindowGrid {
    Index height, width;
    Index side;  ///< of a window

    COLT5_HOST_DEVICE Index rows() const { return divide_up(height, side); }  ///< of windows
    COLT5_HOST_DEVICE Index columns() const { return divide_up(width, side); }
    COLT5_HOST_DEVICE Index windows() const { return rows() * columns(); }
    /// In the sequence, padding included.
    COLT5_HOST_DEVICE Index tokens() const { return windows() * side * side; }
    COLT5_HOST_DEVICE bool is_padded() const { return height % side != 0 || width % side != 0; }

    /// The place in the sequence of the token at (y, x).
    COLT5_HOST_DEVICE Index token_at(Index y, Index x) const {
        const Index window = y / side * columns() + x / side;
        return (window * side + y % side) * side + x % side;
    }
    /// The place in the map of a token of the sequence; beyond the map if it is padding.
    COLT5_HOST_DEVICE MapPosition position(Index token) const {
        const Index window = token / (side * side), in_window = token % (side * side);
        return {window / columns() * side + in_window / side, window % columns() * side + in_window % side};
    }
    COLT5_HOST_DEVICE bool contains(MapPosition at) const { return at.y < height && at.x < width; }
};

namespace detail {
/// The shape of `batch` maps.
inline std::array<Index, 4> map_shape(Index batch, const WindowGrid& grid, Index dim, bool channel_first) {
    return channel_first ? std::array{batch, dim, grid.height, grid.width}
                         : std::array{batch, grid.height, grid.width, dim};
}
}  // namespace detail

/// The grid of maps (b, h, w, d), or (b, d, h, w) with channel_first. Throws ValueError when a map has 2^31 tokens or
/// more, with the padding.
template <Viewable X>
WindowGrid window_grid(std::string_view argument, const X& maps, Index side, bool channel_first = false) {
    static_assert(X::rank == 4, "colt5: maps have four dimensions");
    expect_value(side >= 1 && side <= 1 << 15, "side", "in [1, 2^15]", side);
    const WindowGrid grid{maps.extent(channel_first ? 2 : 1), maps.extent(channel_first ? 3 : 2), side};
    constexpr Index most = (Index{1} << 31) - 1;
    const bool fits = grid.height <= most && grid.width <= most &&
                      (grid.rows() == 0 || grid.columns() <= most / (side * side) / grid.rows());
    if (!fits) expect_value(false, argument, "of less than 2^31 tokens a map", grid.height);
    return grid;
}

/// Maps as sequences of windows:  tokens[b, grid.token_at(y, x)] = maps[b, y, x], zeros in the padding
///
///     maps (b, h, w, d), or (b, d, h, w) with channel_first  →  tokens (b, grid.tokens(), d)
template <Policy P, Viewable X>
auto to_windows(const P& policy, const X& maps, const WindowGrid& grid, bool channel_first = false) {
    using Scalar = typename X::value_type;
    const Index dim = maps.extent(channel_first ? 1 : 3);
    expect_shape("maps", maps.shape(), detail::map_shape(maps.extent(0), grid, dim, channel_first));
    TokensTensor<Scalar, P> tokens(policy, {maps.extent(0), grid.tokens(), dim});
    windows_kernel(policy, tokens.view(), maps.const_view(), grid, channel_first);
    return tokens;
}

/// Back, without the padding:  maps[b, y, x] = tokens[b, grid.token_at(y, x)]
///
/// Each is the vector-Jacobian product of the other. `maps` may hold the tensor to return, which is then written to.
template <Policy P, Viewable X>
auto from_windows(const P& policy, const X& tokens, const WindowGrid& grid, bool channel_first = false,
                  MapTensor<typename X::value_type, P> maps = {}) {
    using Scalar = typename X::value_type;
    const auto [batch, length, dim] = tokens.shape();
    expect_shape("tokens", tokens.shape(), {batch, grid.tokens(), dim});
    const auto shape = detail::map_shape(batch, grid, dim, channel_first);
    if (maps)
        expect_shape("maps", maps.shape(), shape);
    else
        maps = MapTensor<Scalar, P>(policy, shape);
    windows_kernel(policy, maps.view(), tokens.const_view(), grid, channel_first);
    return maps;
}

/// The mask of the sequence: false in the padding and where mask (b, h, w) is  →  (b, grid.tokens()), or an empty
/// tensor if there is neither a mask nor padding.
template <Policy P>
auto window_mask(const P& policy, MapMask mask, Index batch, const WindowGrid& grid) {
    using Out = Tensor<bool, P, dynamic, dynamic>;
    if (mask) expect_shape("mask", mask.shape(), {batch, grid.height, grid.width});
    if (!mask && !grid.is_padded()) return Out();
    Out out(policy, {batch, grid.tokens()});
    window_mask_kernel(policy, out.view(), mask, grid);
    return out;
}

}  // namespace colt5
