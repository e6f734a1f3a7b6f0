// SPDX-License-Identifier: MIT
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <utility>

#include <colt5/cuda/grid_team.cuh>
#include <colt5/cuda/kernel.cuh>
#include <colt5/op/top_k.hpp>

namespace colt5 {

namespace cuda {

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
    team.wait_for_readers();
    return selection;
}

/// The keys (rank, index) of the k tokens that each row chooses, in no particular order.
template <typename Team, typename T>
__global__ void __launch_bounds__(Team::threads)
    choose_top(TeamBarrier barrier, RowSplit split, typename Rank<T>::Key* chosen, const T* logits, const bool* mask,
               Index routes, Index k, int index_bits) {
    using Key = typename Rank<T>::Key;
    using RankType = typename Rank<T>::type;
    extern __shared__ double dynamic_shared[];
    auto* const ranks = reinterpret_cast<RankType*>(dynamic_shared);
    Team team(barrier, split);
    const T* const logit = logits + team.row * split.length + team.begin;
    const RowMask real(mask, team.row, routes, split.length, team.begin);
    const auto rank_of = [&](Index i) { return real[i] ? Rank<T>::of(logit[i]) : Rank<T>::masked; };
    if (split.on_chip)
        for (Index i = threadIdx.x; i < team.count; i += Team::threads) ranks[i] = rank_of(i);
    const auto key_at = [&](Index i) {
        return (Key{split.on_chip ? ranks[i] : rank_of(i)} << index_bits) | static_cast<Key>(team.begin + i);
    };
    const auto selected =
        select_smallest<Key>(team, Rank<T>::bits + index_bits, split.length, k, key_at);  // keys are distinct

    unsigned mine = 0;
    for (Index i = threadIdx.x; i < team.count; i += Team::threads) mine += selected(key_at(i)) ? 1 : 0;
    const Index first = team.sum_before(mine);
    __shared__ unsigned taken;
    if (threadIdx.x == 0) taken = 0;
    __syncthreads();
    for (Index i = threadIdx.x; i < team.count; i += Team::threads)
        if (const Key key = key_at(i); selected(key)) chosen[team.row * k + first + atomicAdd(&taken, 1u)] = key;
}

template <typename Key>
__device__ TokenIndex index_of_key(Key key, int index_bits) {
    return static_cast<TokenIndex>(key & ((Key{1} << index_bits) - 1));
}

/// The length of the runs of keys that top_k sorts by sort_runs.
inline constexpr Index sorted_run = 4096;

/// Sorts each run of distinct keys by counting: a warp counts the smaller keys of one key, which is the key's place.
/// Writes keys, or their indices if `indices` is not null.
template <typename Key, Index run_length = sorted_run>
__global__ void sort_runs(Key* sorted, TokenIndex* indices, const Key* keys, Index rows, Index k, int index_bits) {
    const Index key_index = global_thread() / warp_size, row = key_index / k, i = key_index % k;
    if (row >= rows) return;
    const Index start = row * k + i / run_length * run_length;
    const int size = static_cast<int>(::min(run_length, (row + 1) * k - start));
    const Key* const run = keys + start;
    const Key mine = keys[key_index];
    unsigned smaller = 0;
#pragma unroll 16
    for (int j = lane_id(); j < size; j += warp_size) smaller += run[j] < mine ? 1 : 0;
    smaller = __reduce_add_sync(0xffffffffu, smaller);
    if (threadIdx.x % warp_size != 0) return;
    if (indices)
        indices[start + smaller] = index_of_key(mine, index_bits);
    else
        sorted[start + smaller] = mine;
}

/// Merges pairs of neighbouring sorted runs. A key's place is its index in its own run plus the number of smaller keys
/// in the other run.
template <typename Key>
__global__ void merge_runs(Key* merged, const Key* keys, Index rows, Index k, Index run) {
    for (Index at = global_thread(); at < rows * k; at += grid_threads()) {
        const Index row = at / k, i = at % k, start = i / run * run, pair = i / (2 * run) * (2 * run);
        const Index other = start == pair ? ::min(start + run, k) : pair, other_end = ::min(other + run, k);
        const Key* const row_keys = keys + row * k;
        const Key mine = row_keys[i];
        Index low = other, high = other_end;
        while (low < high) {
            const Index middle = (low + high) / 2;
            if (row_keys[middle] < mine)
                low = middle + 1;
            else
                high = middle;
        }
        merged[row * k + pair + (i - start) + (low - other)] = mine;
    }
}

template <typename Key>
__global__ void indices_of_keys(TokenIndex* indices, const Key* keys, Index count, int index_bits) {
    for (Index i = global_thread(); i < count; i += grid_threads()) indices[i] = index_of_key(keys[i], index_bits);
}

}  // namespace cuda

/// A radix select of distinct keys (rank of the logit, index) by one team of blocks for each row, then a sort of the
/// selected keys.
template <typename T>
void top_k_kernel(const Cuda& policy, TokensView<TokenIndex> indices, TokensView<const T> logits, Mask mask) {
    using Key = typename cuda::Rank<T>::Key;
    const Index routes = logits.extent(1), length = logits.extent(2), k = indices.extent(2);
    const Index rows = logits.extent(0) * routes, count = rows * k;
    if (count == 0) return;
    const int index_bits = std::bit_width(static_cast<std::size_t>(length - 1));
    VectorTensor<Key, Cuda> keys(policy, {count}), sorted(policy, {k > cuda::sorted_run ? count : 0});
    cuda::launch_teams<typename cuda::Rank<T>::type>(policy, "choose_top", cuda::choose_top<cuda::ClusterTeam, T>,
                                                     cuda::choose_top<cuda::GridTeam, T>, rows, length, keys.data(),
                                                     logits.data(), mask.data(), routes, k, index_bits);
    constexpr int threads = 256;
    cuda::launch(policy, "sort_runs", cuda::sort_runs<Key>, cuda::grid(divide_up(count * cuda::warp_size, threads)),
                 threads, 0, sorted.data(), k > cuda::sorted_run ? nullptr : indices.data(), keys.data(), rows, k,
                 index_bits);
    if (k <= cuda::sorted_run) return;
    for (Index run = cuda::sorted_run; run < k; run *= 2) {
        std::swap(keys, sorted);
        cuda::launch(policy, "merge_runs", cuda::merge_runs<Key>, cuda::blocks_for(count, threads), threads, 0,
                     sorted.data(), keys.data(), rows, k, run);
    }
    cuda::launch(policy, "indices_of_keys", cuda::indices_of_keys<Key>, cuda::blocks_for(count, threads), threads, 0,
                 indices.data(), sorted.data(), count, index_bits);
}

}  // namespace colt5
