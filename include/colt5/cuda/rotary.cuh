// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/rotary.hpp>

namespace colt5 {

namespace cuda {

/// The heads that are rotated in rows (groups, heads of a group, 2 · pairs): the first `rotated` of each group.
struct RotatedHeads {
    Index groups, of_group, rotated, pairs;

    __device__ Index count() const { return groups * rotated; }
    /// Where the i-th of them begins in its row.
    __device__ Index offset(Index i) const {
        const Index group = groups == 1 ? 0 : quotient(i, rotated);
        return (i + group * (of_group - rotated)) * 2 * pairs;
    }
};

/// Rows and pairs of them whose sines and cosines a block computes at a time, for all heads.
struct RotaryTile {
    static constexpr int angles = 512;
    Index pairs, rows;

    explicit RotaryTile(Index pairs_of_head)
        : pairs(std::min(pairs_of_head, Index{angles})), rows(angles / std::max(pairs, Index{1})) {}
};

__device__ inline void sine_and_cosine(float angle, float& sin, float& cos) {
    sincosf(angle, &sin, &cos);
}
__device__ inline void sine_and_cosine(double angle, double& sin, double& cos) {
    sincos(angle, &sin, &cos);
}

/// Rotates x (rows, groups, heads of a group, 2 · pairs) in place; one warp takes a row of a tile.
template <typename T, int width>
__global__ void rotary(T* x, const float* inv_freq, const TokenIndex* indices, Index first, Index length, Index rows,
                       RotatedHeads heads, RotaryTile tile, bool back) {
    using Number = accumulate_t<T>;
    __shared__ Number sines[RotaryTile::angles], cosines[RotaryTile::angles];
    const auto tile_pairs = static_cast<int>(tile.pairs), tile_rows = static_cast<int>(tile.rows);
    const int warp = static_cast<int>(threadIdx.x) / warp_size, warps = static_cast<int>(blockDim.x) / warp_size;
    const Index tiles_of_row = divide_up(heads.pairs, tile.pairs),
                row_stride = 2 * heads.groups * heads.of_group * heads.pairs;
    const Index tiles = divide_up(rows, tile.rows) * tiles_of_row;
    for (Index t = blockIdx.x; t < tiles; t += gridDim.x) {
        const Index first_row = quotient(t, tiles_of_row) * tile.rows;
        const Index first_pair = t % tiles_of_row * tile.pairs;
        __syncthreads();  // the tables may still be read
        for (int i = static_cast<int>(threadIdx.x); i < tile_rows * tile_pairs; i += static_cast<int>(blockDim.x)) {
            const Index row = first_row + i / tile_pairs, pair = first_pair + i % tile_pairs;
            if (row >= rows || pair >= heads.pairs) continue;
            const Index position = indices != nullptr ? indices[row] : first + row - quotient(row, length) * length;
            const double angle =
                colt5::detail::rotary_angle(static_cast<double>(position), static_cast<double>(inv_freq[pair]));
            sine_and_cosine(static_cast<Number>(angle), sines[i], cosines[i]);
            if (back) sines[i] = -sines[i];
        }
        __syncthreads();
        const Index packs = std::min(tile.pairs, heads.pairs - first_pair) / width;
        for (int r = warp; r < tile_rows && first_row + r < rows; r += warps)
            for (Index i = lane_id(); i < heads.count() * packs; i += warp_size) {
                const Index head = quotient(i, packs), pair = (i - head * packs) * width;
                T* const low = x + (first_row + r) * row_stride + heads.offset(head) + first_pair + pair;
                auto a = load_pack<width>(low), b = load_pack<width>(low + heads.pairs);
#pragma unroll
                for (int e = 0; e < width; ++e) {
                    const Number s = sines[r * tile_pairs + pair + e], c = cosines[r * tile_pairs + pair + e];
                    const auto u = static_cast<Number>(a.values[e]), v = static_cast<Number>(b.values[e]);
                    a.values[e] = static_cast<T>(u * c - v * s);
                    b.values[e] = static_cast<T>(v * c + u * s);
                }
                store_pack(low, a);
                store_pack(low + heads.pairs, b);
            }
    }
}

}  // namespace cuda

template <typename T>
void rotary_kernel(const Cuda& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic> x, Index heads,
                   VectorView<const float> inv_freq, const RowPositions& at, bool back) {
    constexpr int threads = 256;
    const auto [batch, length, groups, all_heads, dim_head] = x.shape();
    const Index pairs = dim_head / 2;
    if (x.size() == 0) return;
    const cuda::RotaryTile tile(pairs);
    const Index tiles = divide_up(batch * length, tile.rows) * divide_up(pairs, tile.pairs);
    cuda::with_pack_size<T>(
        pairs,
        [&]<int width>(std::integral_constant<int, width>) {
            cuda::launch(policy, "rotary", cuda::rotary<T, width>, cuda::blocks_for(tiles, 1), threads, 0, x.data(),
                         inv_freq.data(), at.indices.data(), at.first, length, batch * length,
                         cuda::RotatedHeads{groups, all_heads, heads, pairs}, tile, back);
        },
        x.data());
}

}  // namespace colt5
