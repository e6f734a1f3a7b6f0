// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <colt5/cuda/launch.cuh>

/// What the two kinds of teams share: how a row is cut, and reductions within a block. See row_team.cuh.
namespace colt5::cuda {

inline constexpr int histogram_bins = 256;  // not more than a block has threads

/// A block's contribution to a reduction over its row: a value and a count.
struct alignas(16) Partial {
    double first, second;
};

/// The rows of one launch, and how each is cut into chunks, one for each block of its team.
struct RowPart {
    Index first_row, rows;  // of the launch
    Index length, chunk;    // entries of a row, and of a chunk
    bool on_chip;           ///< a block keeps its chunk in shared memory
};

/// Global memory for the barriers of the teams of a launch that are no clusters, one barrier for each row. `arrivals`
/// and `histograms` are zeros at the start.
struct TeamBarrier {
    Partial* partials;     // (rows, 2, blocks)
    unsigned* arrivals;    // (rows)
    unsigned* histograms;  // (rows, most_histograms, bins)
    int blocks;            // of a team
};

/// The identity, for reductions that nothing follows.
struct Unchanged {
    __device__ Partial operator()(const Partial& partial) const { return partial; }
};

/// Reduces a value of each thread of a block by `with`, and sums a count of each. The first warp computes
/// across(partial of the block), and every thread gets its result. The order is fixed, so that the bits are the same
/// every time.
template <int threads, typename T, typename Combine, typename Across>
__device__ auto combine_in_block(T first, unsigned second, Combine&& with, Across&& across) {
    constexpr int warps = threads / warp_size;  // a power of two
    using Result = decltype(across(Partial{}));
    __shared__ T first_of_warp[warps];
    __shared__ unsigned second_of_warp[warps];
    __shared__ Result result;
    const int warp = static_cast<int>(threadIdx.x) / warp_size, lane = lane_id();
    first = warp_reduce(first, with);
    second = __reduce_add_sync(0xffffffffu, second);
    if (lane == 0) {
        first_of_warp[warp] = first;
        second_of_warp[warp] = second;
    }
    __syncthreads();
    if (warp == 0) {
        first = first_of_warp[lane % warps];
        for (int offset = warps / 2; offset > 0; offset /= 2)
            first = with(first, __shfl_xor_sync(0xffffffffu, first, offset));
        second = __reduce_add_sync(0xffffffffu, lane < warps ? second_of_warp[lane] : 0);
        const Result of_all = across(Partial{static_cast<double>(first), static_cast<double>(second)});
        if (lane == 0) result = of_all;
    }
    __syncthreads();
    return result;
}

}  // namespace colt5::cuda
