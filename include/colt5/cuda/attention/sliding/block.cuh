// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention/sliding/mask.cuh>
#include <colt5/cuda/attention/sliding/tile.cuh>

/// What a block of sliding_backward.cuh has: shared memory, and which tiles.
namespace colt5::cuda::sliding {

inline constexpr int key_stages = 5;      // those of both warpgroups, which are one step apart, and the next
inline constexpr int value_stages = 4;    // those of the softmax warpgroup, and the next
inline constexpr int query_stages = 3;    // those of both warpgroups, and the next
inline constexpr int weight_buffers = 2;  // of p and ds: the softmax warpgroup is one step ahead

struct Shared {
    SwizzledTile k[key_stages], v[value_stages], q[query_stages], d_out[query_stages];
    SwizzledTile p[weight_buffers][neighbours], ds[weight_buffers][neighbours];
    SwizzledTile d_q;  // on its way to global memory
    VisibleKeys visible[key_stages];
    float shift[query_stages][tile_rows];  // log-sum-exps over ln 2
    float bias[bias_entries];
    hopper::Barrier keys_full[key_stages], keys_empty[key_stages];
    hopper::Barrier values_full[value_stages], values_empty[value_stages];
    hopper::Barrier queries_full[query_stages], queries_empty[query_stages];
    hopper::Barrier weights_full[weight_buffers], weights_empty[weight_buffers];
};
static_assert(sizeof(Shared) <= most_shared_bytes);

/// The tiles of a block. Tile t has the queries from 64 t on and the keys from a.first + 64 t on.
struct Segment {
    int first, end;  // own query tiles
    int first_key,
        end_key;            // own key tiles: the same, and those of keys before the first and after the last query tile
    int first_step, steps;  // query tiles that it visits

    template <typename T>
    __device__ Segment(const Attention<T>& a, int index, int tiles_each) {
        const int tiles = (a.queries + tile_rows - 1) / tile_rows;
        first = index * tiles_each;
        end = ::min(first + tiles_each, tiles);
        first_key = first == 0 && a.first > 0 ? -1 : first;
        end_key = end == tiles ? ::max(tiles, (a.keys - a.first + tile_rows - 1) / tile_rows) : end;
        first_step = ::max(first - 1, 0);
        steps = ::min(end + 1, tiles) - first_step;
    }
};

/// The first key of the first tile, at most 0. Groups of 16 keys are counted from it.
template <typename T>
__device__ int first_key(const Attention<T>& a) {
    return a.first > 0 ? a.first - tile_rows : 0;
}

}  // namespace colt5::cuda::sliding
