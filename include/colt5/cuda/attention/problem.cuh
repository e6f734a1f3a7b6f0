// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include <colt5/cuda/kernel.cuh>

/// The memory layout of an attention problem, and what a thread block owns of it.
namespace colt5::cuda {

/// The rows of one head: row i starts at data + i · stride.
template <typename T>
struct Rows {
    T* data;
    Index stride;

    __device__ T* operator[](int i) const { return data + i * stride; }
};

/// Rows that `picks` chooses.
template <typename T>
struct PickedRows {
    Rows<T> rows;
    const TokenIndex* picks;

    __device__ T* operator[](int i) const { return rows[picks[i]]; }
};

/// Where the rows of each head start, given its batch entry, its route and its number within the route.
template <typename T>
struct Heads {
    T* data;
    Index batch, route, head, token;  // strides

    __device__ Rows<T> at(int b, int r, int h) const { return {data + b * batch + r * route + h * head, token}; }
    template <typename U>
    COLT5_HOST_DEVICE Heads<U> with(U* other) const {
        return {other, batch, route, head, token};
    }
};

/// One problem: the queries, keys and values of every head. Local attention has a finite reach, dense attention none.
template <typename T>
struct Attention {
    using Sum = accumulate_t<T>;
    static constexpr int everything = 1 << 29;

    Heads<const T> q, k, v, out;
    int batch, routes, per_route, queries, keys, dim_head;
    // Query i attends to key j if −reach <= j − (first + i) <= ahead; `ahead` is `reach`, or 0 for causal attention.
    int reach, ahead;
    int first;                          // position of the first query among the keys; 0 for dense attention
    const bool* mask;                   // (batch, routes, keys) or null
    const Sum* value_scale;             // (batch, routes, keys) or null
    Sum scale;                          // 1 / √dim_head
    bool vectors;                       // the address and the length of every row are multiples of 16 bytes
    const TokenIndex* picks = nullptr;  // KeyRows::picked: (batch, routes, keys), which rows of k and v the keys are
    bool sees_zeros = false;            // queries also attend to keys of 0 behind the sequence; log-sum-exps have them

    COLT5_HOST_DEVICE int heads() const { return routes * per_route; }
};

/// Converts an extent of a problem to 32 bits. The limit leaves room for a position plus a reach.
template <typename T>
int attention_extent(const char* name, Index extent) {
    expect_value(extent <= Attention<T>::everything, name, "at most 536870912 in attention on a GPU", extent);
    return static_cast<int>(extent);
}

/// The grid of AttentionBlock: one block for each tile of `tile_rows` of the `rows` rows of every head. The batch has
/// dimensions of its own, so that kernels need not divide by the number of tiles as well.
template <typename T>
dim3 attention_grid(const Attention<T>& a, Index rows, Index tile_rows) {
    dim3 blocks = grid(divide_up(rows, tile_rows) * a.heads());
    blocks.z = static_cast<unsigned>(std::max(Index{1}, divide_up(a.batch, 65535)));
    blocks.y = static_cast<unsigned>(divide_up(a.batch, blocks.z));
    return blocks;
}

/// What one block owns: a head of one sequence, and its queries or keys from `first` on. Consecutive blocks have
/// consecutive heads, so that blocks that run at the same time read neighbouring memory.
template <typename T>
struct AttentionBlock {
    int b, h, route, first;

    __device__ AttentionBlock(const Attention<T>& a, int tile_rows) {
        const int item = static_cast<int>(blockIdx.x), heads = a.heads();
        b = static_cast<int>(blockIdx.y + blockIdx.z * gridDim.y);
        h = item % heads;
        route = a.routes == 1 ? 0 : h / a.per_route;
        first = item / heads * tile_rows;
    }
    __device__ AttentionBlock(const Attention<T>& a, int b_, int h_)
        : b(b_), h(h_), route(a.routes == 1 ? 0 : h_ / a.per_route), first(0) {}
    /// Whether the block has no sequence. The batch takes two dimensions of the grid, 65,535 by 65,535 at most, and
    /// need not fill them.
    __device__ bool is_beyond(const Attention<T>& a) const { return b >= a.batch; }
    template <typename U>
    __device__ Rows<U> rows(const Attention<T>& a, const Heads<U>& heads) const {
        return heads.at(b, route, h - route * a.per_route);
    }
    /// The rows of the block's keys or values.
    template <bool picked>
    __device__ auto key_rows(const Attention<T>& a, const Heads<const T>& heads) const {
        if constexpr (picked)
            return PickedRows<const T>{rows(a, heads), a.picks + of_keys(a)};
        else
            return rows(a, heads);
    }
    /// The mask of the block's keys, false where masked, and the factors of their values; null if there are none.
    __device__ const bool* mask(const Attention<T>& a) const {
        return a.mask != nullptr ? a.mask + of_keys(a) : nullptr;
    }
    __device__ const typename Attention<T>::Sum* value_scale(const Attention<T>& a) const {
        return a.value_scale != nullptr ? a.value_scale + of_keys(a) : nullptr;
    }
    /// Offsets of the block's row in (batch, routes, keys), and in (batch, heads, queries).
    __device__ Index of_keys(const Attention<T>& a) const {
        return (static_cast<Index>(b) * a.routes + route) * a.keys;
    }
    __device__ Index of_queries(const Attention<T>& a) const {
        return (static_cast<Index>(b) * a.heads() + h) * a.queries;
    }
};

inline bool is_aligned(const void* data) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

}  // namespace colt5::cuda
