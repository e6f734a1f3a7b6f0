// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <limits>

#include <colt5/cuda/attention/sliding/tile.cuh>

/// What the host prepares for the kernels of sliding_forward.cuh and sliding_backward.cuh.
namespace colt5::cuda::sliding {

/// Whether `kernel`, of so many threads, can run the problem on this device.
template <typename T, typename... Parameters>
bool supports(const Cuda& policy, const Attention<T>& a, void (*kernel)(Parameters...), int threads) {
    return a.batch > 0 && a.heads() > 0 && a.queries > 0 && a.dim_head == dim && a.routes == 1 &&
           a.reach <= tile_rows && a.vectors && a.value_scale == nullptr && hopper::runs_on(policy, kernel, threads);
}

/// The number of tiles of a segment: that of the fewest steps one after another on a multiprocessor. A segment takes
/// about as long as its own tiles and four more: in backward those at each end that others visit, too, and while its
/// pipeline fills and drains.
inline Index tiles_of_segment(Index tiles, Index heads, Index processors) {
    constexpr Index overhead = 4;
    Index best = tiles, least = std::numeric_limits<Index>::max();
    for (Index segments = 1; segments <= std::min(tiles, 4 * processors); ++segments) {
        const Index each = divide_up(tiles, segments);
        const Index steps = divide_up(divide_up(tiles, each) * heads, processors) * (each + overhead);
        if (steps < least) least = steps, best = each;
    }
    return best;
}

/// The tensor map of the first `rows` rows of all heads.
template <typename T, typename U>
CUtensorMap map_of(const Attention<T>& a, const Heads<U>& of, int rows) {
    return hopper::tensor_map<T, 4>(of.data, {dim, rows, a.heads(), a.batch}, {of.token, of.head, of.batch}, tile_rows);
}

}  // namespace colt5::cuda::sliding
