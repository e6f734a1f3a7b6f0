// SPDX-License-Identifier: MIT
#pragma once

#include <limits>
#include <type_traits>

#include <colt5/cuda/attention/bias.cuh>
#include <colt5/cuda/attention/mask.cuh>
#include <colt5/cuda/attention/online_softmax.cuh>
#include <colt5/cuda/attention/sliding/tile.cuh>

/// Which pairs of a query tile and its three key tiles attention hides, and the bias of the others.
namespace colt5::cuda::sliding {

/// Entry i of a tile is in the thread's first row or in its second one.
__device__ inline float of_row(const float2& rows, int i) {
    return i % 4 < 2 ? rows.x : rows.y;
}

/// run<j>() for the three key tiles of a query tile.
template <typename Run>
__device__ void for_each_tile(const Run& run) {
    run.template operator()<0>();
    run.template operator()<1>();
    run.template operator()<2>();
}

/// Entry i of a thread's tile has a key that is from_first(i) + pair − upper tokens after its query, if the key tile
/// begins at the same token as the query tile.
__device__ constexpr int from_first(int i) {
    return 8 * (i / 4 - i % 4 / 2) + i % 2;
}

/// Which pairs of a thread are in reach: those with least <= distance + from_first(i) <= most.
struct ThreadReach {
    int least, most;

    __device__ ThreadReach(const Reach& reach, const TileThread& at)
        : least(at.upper - at.pair - reach.before), most(at.upper - at.pair + reach.after) {}
};

/// Sets the entries of pairs out of reach to `value`. The key tile begins `distance` tokens after the query tile.
template <int distance>
__device__ void set_out_of_reach(float (&tile)[32], float value, const Reach& reach, const ThreadReach& of_thread) {
    if (distance - 63 < -reach.before)
#pragma unroll
        for (int i = 0; i < 32; ++i)
            if (distance + from_first(i) < of_thread.least) tile[i] = value;
    if (distance + 63 > reach.after)
#pragma unroll
        for (int i = 0; i < 32; ++i)
            if (distance + from_first(i) > of_thread.most) tile[i] = value;
}
/// Sets the entries of keys that are masked or outside the sequence to `value`.
__device__ inline void set_invisible(float (&tile)[32], float value, const VisibleKeys& visible, const TileThread& at) {
    if (!visible.all()) {
        const int pair = rarely_needed(at.pair);
#pragma unroll
        for (int i = 0; i < 32; ++i)
            if ((visible.words[i / 16] >> pair >> (8 * (i / 4 % 4) + i % 2) & 1) == 0) tile[i] = value;
    }
}

/// A key of three tiles is at most 127 tokens before or after a query. Entry i of a table in shared memory is the bias
/// of the distance i − bias_center.
inline constexpr int bias_center = 2 * tile_rows - 1, bias_entries = 2 * bias_center + 1;

template <typename Bias>
inline constexpr bool has_bias = !std::is_same_v<Bias, NoBias>;

/// Sets `to` to the bias over ln 2 by distance, and −∞ out of reach. All threads of the block call it.
__device__ inline void load_bias(float (&)[bias_entries], const Reach&, int, NoBias) {}
__device__ inline void load_bias(float (&to)[bias_entries], const Reach& reach, int h, const WindowBias<float>& bias) {
    const float* const center = bias.by_distance + static_cast<Index>(h) * (2 * bias.span + 1) + bias.span;
    for (int i = static_cast<int>(threadIdx.x); i < bias_entries; i += static_cast<int>(blockDim.x)) {
        const int distance = i - bias_center;
        to[i] = reach.excludes(distance)
                    ? -std::numeric_limits<float>::infinity()
                    : center[::max(-bias.span, ::min(bias.span, distance))] * static_cast<float>(log2_e);
    }
}

}  // namespace colt5::cuda::sliding
