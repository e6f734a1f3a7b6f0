// SPDX-License-Identifier: MIT
#pragma once

#include <bit>
#include <utility>

#include <colt5/cuda/radix_select.cuh>
#include <colt5/cuda/row_mask.cuh>
#include <colt5/cuda/row_team.cuh>
#include <colt5/op/top_k.hpp>

namespace colt5 {

namespace cuda {

/// The keys (rank, index) of the k tokens that each row chooses, in no particular order.
template <typename Team, typename T>
__global__ void __launch_bounds__(Team::threads)
    choose_top(TeamBarrier barrier, RowPart part, typename Rank<T>::Key* chosen, const T* logits, const bool* mask,
               Index routes, Index k, int index_bits) {
    using Key = typename Rank<T>::Key;
    using RankType = typename Rank<T>::type;
    extern __shared__ double dynamic_shared[];
    auto* const ranks = reinterpret_cast<RankType*>(dynamic_shared);
    Team team(barrier, part);
    const T* const logit = logits + team.row * part.length + team.begin;
    const RowMask real(mask, team.row, routes, part.length, team.begin);
    const auto rank_of = [&](Index i) { return real[i] ? Rank<T>::of(logit[i]) : Rank<T>::masked; };
    if (part.on_chip)
        for (Index i = threadIdx.x; i < team.count; i += Team::threads) ranks[i] = rank_of(i);
    const auto key_at = [&](Index i) {
        return (Key{part.on_chip ? ranks[i] : rank_of(i)} << index_bits) | static_cast<Key>(team.begin + i);
    };
    const auto selected =
        select_smallest<Key>(team, Rank<T>::bits + index_bits, part.length, k, key_at);  // keys are distinct

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

/// The length of a run of keys that sort_runs sorts.
inline constexpr Index sorted_run = 4096;

/// Sorts each run of distinct keys by counting: a warp counts the smaller keys of one key, which is the key's place.
/// Writes keys, or their indices if `indices` is not null.
template <typename Key>
__global__ void sort_runs(Key* sorted, TokenIndex* indices, const Key* keys, Index rows, Index k, int index_bits) {
    const Index key_index = global_thread() / warp_size, row = key_index / k, i = key_index % k;
    if (row >= rows) return;
    const Index start = row * k + i / sorted_run * sorted_run;
    const int size = static_cast<int>(::min(sorted_run, (row + 1) * k - start));
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
    for (Index at = global_thread(); at < rows * k; at += all_threads()) {
        const Index row = at / k, i = at % k, start = i / run * run, pair = i / (2 * run) * (2 * run);
        const Index other = start == pair ? ::min(start + run, k) : pair, other_end = ::min(other + run, k);
        const Key* const of_row = keys + row * k;
        const Key mine = of_row[i];
        Index low = other, high = other_end;
        while (low < high) {
            const Index middle = (low + high) / 2;
            if (of_row[middle] < mine)
                low = middle + 1;
            else
                high = middle;
        }
        merged[row * k + pair + (i - start) + (low - other)] = mine;
    }
}

template <typename Key>
__global__ void indices_of_keys(TokenIndex* indices, const Key* keys, Index count, int index_bits) {
    for (Index i = global_thread(); i < count; i += all_threads()) indices[i] = index_of_key(keys[i], index_bits);
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
