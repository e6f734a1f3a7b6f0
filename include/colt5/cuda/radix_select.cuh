// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <limits>

#include <colt5/cuda/block_scan.cuh>
#include <colt5/cuda/row_part.cuh>
#include <colt5/op/top_k.hpp>

/// Radix select: finds the smallest of many keys by counting digits, from the highest to the lowest.
namespace colt5::cuda {

/// The rank of a logit, and the type of keys that hold a rank and an index below.
template <typename T>
struct Rank;
template <>
struct Rank<float> : LogitRank<float> {
    using Key = std::uint64_t;
};
template <>
struct Rank<double> : LogitRank<double> {
    __extension__ using Key = unsigned __int128;
};

/// The selected keys are those with (key >> shift) <= prefix.
template <typename Key>
struct Selection {
    Key prefix;
    int shift;
    __device__ bool operator()(Key key) const { return (key >> shift) <= prefix; }
};

/// Selects the `wanted` smallest of the `total` keys of a row, of `bits` bits each; if keys are equal, perhaps more.
/// key_at(i) is the key of entry i of this block's chunk.
template <typename Key, typename Team, typename KeyAt>
__device__ Selection<Key> select_smallest(Team& team, int bits, Index total, Index wanted, const KeyAt& key_at) {
    constexpr int digit_bits = 8;
    static_assert(1 << digit_bits == histogram_bins);
    __shared__ unsigned histograms[2][histogram_bins];  // two, since other blocks may still read the previous one
    __shared__ unsigned found_digit, found_before, found_count;
    const bool has_bin = threadIdx.x < histogram_bins;
    Selection<Key> selection{0, bits};
    auto candidates = static_cast<unsigned>(total), needed = static_cast<unsigned>(wanted);
    if (has_bin) histograms[0][threadIdx.x] = 0;
    __syncthreads();
    for (int digit = 0; candidates != needed && selection.shift > 0; ++digit) {
        unsigned* const histogram = histograms[digit % 2];
        const int width = ::min(digit_bits, selection.shift), shift = selection.shift - width;
        for (Index i = threadIdx.x; i < team.count; i += Team::threads) {
            const Key key = key_at(i);
            if ((key >> selection.shift) == selection.prefix)
                atomicAdd(histogram + (static_cast<unsigned>(key >> shift) & ((1u << width) - 1)), 1u);
        }
        const unsigned in_bin = team.merge_histogram(histogram, digit);
        if (has_bin) histograms[(digit + 1) % 2][threadIdx.x] = 0;
        const unsigned before = block_inclusive_sum<Team::threads>(in_bin) - in_bin;
        if (before < needed && needed <= before + in_bin) {
            found_digit = threadIdx.x;
            found_before = before;
            found_count = in_bin;
        }
        __syncthreads();
        selection = {(selection.prefix << width) | found_digit, shift};
        needed -= found_before;
        candidates = found_count;
    }
    team.stay();
    return selection;
}

}  // namespace colt5::cuda
