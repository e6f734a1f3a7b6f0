// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include <colt5/cuda/attention/problem.cuh>
#include <colt5/cuda/ptx.cuh>

/// Tiles of sliding_forward.cuh and sliding_backward.cuh: rings of them in shared memory, and a thread's part of a tile
/// in registers.
namespace colt5::cuda::sliding {

inline constexpr int dim = 64, tile_rows = 64, tile_bytes = tile_rows * dim * 2, warpgroup = 128, warps = 4;
inline constexpr int most_shared_bytes = 227 * 1024;  // of a block of compute capability 9.0
inline constexpr int neighbours = 3;                  // key tiles that a query tile sees
/// A tile (64, 64), swizzled as TMA does it.
struct alignas(1024) SwizzledTile {
    std::byte bytes[tile_bytes];

    /// The descriptor for wgmma of 16 columns of it from column 16 k on, or of 16 rows.
    __device__ std::uint64_t columns(int k) const { return hopper::matrix_descriptor(bytes) + 2 * k; }
    __device__ std::uint64_t rows(int k) const { return hopper::matrix_descriptor(bytes) + 128 * k; }
};

/// Which keys of a tile are in the sequence and not masked, one bit each.
struct VisibleKeys {
    std::uint32_t words[2];

    __device__ bool all() const { return (words[0] & words[1]) == 0xffffffffu; }
};

/// The i-th use of a ring of stages: its stage, and the parity to wait for on the barrier `full`. The one to wait for
/// on `empty` is the other; in the first round that does not wait.
template <int stages>
struct Ring {
    int use;
    int stage = use % stages;
    unsigned parity = static_cast<unsigned>(use / stages) & 1u;

    __device__ Ring operator+(int later) const { return {use + later}; }
};

/// Where the accumulators of a thread are in a tile; see hopper::product.
struct TileThread {
    int warp, lane, upper,
        pair;  // upper: its first row, the other one is 8 below; pair: the first column in each eight

    __device__ TileThread()
        : warp(static_cast<int>(threadIdx.x) % warpgroup / warp_size),
          lane(lane_id()),
          upper(16 * warp + lane / 4),
          pair(2 * (lane % 4)) {}
};

/// Whether all entries of the warp's rows are finite.
__device__ inline bool is_finite(const float (&tile)[32]) {
    float zero[4] = {0, 0, 0, 0};  // or NaN
#pragma unroll
    for (int i = 0; i < 32; ++i) zero[i % 4] = ::fmaf(tile[i], 0.0f, zero[i % 4]);
    return __all_sync(0xffffffffu, (zero[0] + zero[1]) + (zero[2] + zero[3]) == 0);
}

/// Writes factor · tile in 16 bits.
template <typename T>
__device__ void write_tile(SwizzledTile& to, const float (&tile)[32], const TileThread& at, float factor = 1) {
    // Lane 8 i + r has the address of row r of matrix i. Matrices 0 and 1 are rows 0 to 7 and 8 to 15 of a 16-byte unit
    // (see hopper::matrix_descriptor), 2 and 3 those of the next unit.
    const int row = at.lane % 8, matrix = at.lane / 8;
    const unsigned base =
        shared_address(to.bytes) + static_cast<unsigned>((16 * at.warp + row + 8 * (matrix % 2)) * 128);
    const unsigned unit = static_cast<unsigned>(row ^ (matrix / 2));
    const auto pair = [&](unsigned i) { return pack_pair<T>(factor * tile[i], factor * tile[i + 1]); };
#pragma unroll
    for (unsigned i = 0; i < 8; i += 2)
        hopper::store_matrices(base + ((unit ^ i) << 4), pair(4 * i), pair(4 * i + 2), pair(4 * i + 4),
                               pair(4 * i + 6));
}

/// The same number, of which the compiler computes nothing ahead, so that it takes no registers until it is needed.
__device__ inline int rarely_needed(int number) {
    asm volatile("" : "+r"(number));
    return number;
}

/// Arrives once for the calling warp, after all of its lanes.
__device__ inline void arrive(hopper::Barrier& barrier) {
    __syncwarp();
    if (lane_id() == 0) barrier.arrive();
}

}  // namespace colt5::cuda::sliding
