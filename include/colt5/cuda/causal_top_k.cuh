// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <limits>

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/causal_top_k.hpp>

namespace colt5 {

namespace cuda {

/// One entry for each block of each row, (rows, count). causal_budgets replaces `candidates` by the number of tokens
/// chosen in the block, and `real` by the number chosen before it.
template <typename T>
struct CausalBlockStates {
    T *threshold, *price;
    TokenIndex *candidates, *real;
};

/// How many threads work on a block of tokens.
inline constexpr int causal_threads = 256;

/// Sorts keys of shared memory, smallest first, by a bitonic network; `count` is a power of two.
template <typename Key>
__device__ void sort_shared(Key* keys, int count) {
    for (int run = 2; run <= count; run *= 2)
        for (int distance = run / 2; distance > 0; distance /= 2) {
            __syncthreads();
            for (int i = static_cast<int>(threadIdx.x); i < count / 2; i += causal_threads) {
                const int low = i / distance * 2 * distance + i % distance, high = low + distance;
                const bool ascending = (low & run) == 0;
                const Key a = keys[low], b = keys[high];
                if ((a > b) == ascending) {
                    keys[low] = b;
                    keys[high] = a;
                }
            }
        }
    __syncthreads();
}

/// The price a of converged coordinate descent for the `count` logits s of a history, given as sorted ranks: the scores
/// min(1, e^((s + a) / ε)) add up to k < count. `below` has room for two rows of CausalTopK::largest_block.
template <typename T>
__device__ T price_of(const typename LogitRank<T>::type* ranks, int count, T k, T eps, T* below) {
    const auto logit = [&](int i) { return LogitRank<T>::logit(ranks[i]); };
    const auto ratio = [&](T s, T of) { return s == of ? T(1) : ::exp((s - of) / eps); };
    // below[m]: Σ over i ≥ m of e^((s_i − s_m) / ε), of twice as many terms after each step
    T *from = below, *to = below + CausalTopK::largest_block;
    for (int m = static_cast<int>(threadIdx.x); m < count; m += causal_threads) from[m] = T(1);
    for (int terms = 1; terms < count; terms *= 2) {
        __syncthreads();
        for (int m = static_cast<int>(threadIdx.x); m < count; m += causal_threads)
            to[m] = m + terms < count ? from[m] + from[m + terms] * ratio(logit(m + terms), logit(m)) : from[m];
        T* const swapped = from;
        from = to;
        to = swapped;
    }
    __syncthreads();
    // The m largest have score 1: m is the least number with which the next score, (k − m) / below[m], is at most 1.
    int saturated = count - 1;
    for (int m = static_cast<int>(threadIdx.x); m < saturated; m += causal_threads)
        if (k - static_cast<T>(m) <= from[m]) saturated = m;
    saturated = block_reduce(saturated, count - 1, Smaller());
    return eps * ::log((k - static_cast<T>(saturated)) / from[saturated]) - logit(saturated);
}

/// The logit that a token of a block must reach to be a candidate, and the price of scores (see causal_top_k).
template <typename T>
struct CausalPrice {
    T threshold, price;
};

/// The CausalPrice of a block whose history has `count` real tokens. `ranks` (how.block_size), in shared memory, are
/// those of the history, with LogitRank::masked in the other places; this sorts them. `below` as for price_of.
template <typename T>
__device__ CausalPrice<T> price_of_history(const CausalTopK& how, typename LogitRank<T>::type* ranks, int count,
                                           T* below) {
    CausalPrice<T> of{-std::numeric_limits<T>::infinity(), std::numeric_limits<T>::infinity()};
    if (count == 0) return of;
    sort_shared(ranks, static_cast<int>(how.block_size));
    of.threshold = LogitRank<T>::logit(ranks[how.share(count) - 1]);
    const double k = how.rate * static_cast<double>(count) * how.fetch_k_ratio;
    if (ranks[0] == 0)
        of.price = LogitRank<T>::logit(0);
    else if (k >= static_cast<double>(count))
        of.price = -LogitRank<T>::logit(ranks[count - 1]);
    else
        of.price = price_of(ranks, count, static_cast<T>(k), static_cast<T>(how.eps), below);
    return of;
}

/// One thread block for each block of tokens of each row.
template <typename T>
__global__ void __launch_bounds__(causal_threads)
    causal_prices(CausalTopK how, CausalBlocks blocks, CausalBlockStates<T> states, const T* logits, const bool* mask,
                  Index routes) {
    using Key = typename LogitRank<T>::type;
    __shared__ Key ranks[CausalTopK::largest_block];
    __shared__ T below[2 * CausalTopK::largest_block];
    const RowBlock at(blocks.count());
    const Index row = at.row, block = at.block, begin = blocks.begin(block), first = blocks.history(block);
    const T* const s = logits + row * blocks.length;
    const RowMask real(mask, row, routes, blocks.length);
    const int size = static_cast<int>(how.block_size);

    int mine = 0;
    for (int i = static_cast<int>(threadIdx.x); i < size; i += causal_threads) {
        const bool counts = first + i < begin && real[first + i];
        ranks[i] = counts ? LogitRank<T>::of(s[first + i]) : LogitRank<T>::masked;
        mine += counts;
    }
    const auto [threshold, price] = price_of_history(how, ranks, block_sum(mine), below);
    const auto least = LogitRank<T>::of(threshold);
    int candidates = 0, reals = 0;
    for (Index i = begin + threadIdx.x; i < blocks.end(block); i += causal_threads)
        if (real[i]) {
            ++reals;
            candidates += LogitRank<T>::of(s[i]) <= least;
        }
    candidates = block_sum(candidates);
    reals = block_sum(reals);
    if (threadIdx.x != 0) return;
    const Index place = row * blocks.count() + block;
    states.threshold[place] = threshold;
    states.price[place] = price;
    states.candidates[place] = static_cast<TokenIndex>(candidates);
    states.real[place] = static_cast<TokenIndex>(reals);
}

/// One thread block for each row: thread 0 computes, the others load and store.
template <typename T>
__global__ void __launch_bounds__(causal_threads)
    causal_budgets(CausalTopK how, Index count, Index picks, CausalBlockStates<T> states, TokenIndex* taken) {
    __shared__ TokenIndex candidates[causal_threads], real[causal_threads];
    const Index row = blockIdx.x;
    CausalBudget budget(how, picks);
    Index all = 0;
    for (Index first = 0; first < count; first += causal_threads) {
        const Index place = row * count + first + threadIdx.x;
        const bool inside = first + threadIdx.x < count;
        if (inside) {
            candidates[threadIdx.x] = states.candidates[place];
            real[threadIdx.x] = states.real[place];
        }
        __syncthreads();
        if (threadIdx.x == 0)
            for (Index i = 0; i < ::min(static_cast<Index>(causal_threads), count - first); ++i) {
                candidates[i] = static_cast<TokenIndex>(budget.take(candidates[i], real[i]));
                real[i] = static_cast<TokenIndex>(all);
                all += candidates[i];
            }
        __syncthreads();
        if (inside) {
            states.candidates[place] = candidates[threadIdx.x];
            states.real[place] = real[threadIdx.x];
        }
    }
    if (threadIdx.x == 0) taken[row] = static_cast<TokenIndex>(all);
}

/// A warp for each block of tokens of each row. `taken` (rows) is how many tokens each row has chosen.
template <typename T>
__global__ void causal_picks(CausalTopK how, CausalBlocks blocks, Index rows, Index routes, Index picks,
                             TokenIndex* indices, T* scores, T* slopes, bool* live, CausalBlockStates<T> states,
                             const TokenIndex* taken, const T* logits, const bool* mask) {
    const Index count = blocks.count(), lane = lane_id();
    const auto lanes_before = (1u << lane) - 1;
    for (Index place = global_thread() / warp_size; place < rows * count; place += grid_threads() / warp_size) {
        const Index row = place / count, block = place - row * count;
        const T* const s = logits + row * blocks.length;
        const RowMask real(mask, row, routes, blocks.length);
        const auto least = LogitRank<T>::of(states.threshold[place]);
        const T price = states.price[place];
        const Index last = states.real[place] + states.candidates[place];  // chosen up to the end of this block
        Index chosen = states.real[place];
        for (Index first = blocks.begin(block); first < blocks.end(block); first += warp_size) {
            const Index i = first + lane;
            const bool candidate = i < blocks.end(block) && real[i] && LogitRank<T>::of(s[i]) <= least;
            const unsigned all = __ballot_sync(0xffffffffu, candidate);
            const Index before = chosen + __popc(all & lanes_before);
            // Candidates beyond the budget are not chosen.
            const Index taken_before = ::min(before, last);
            if (candidate && before < last) {
                const ScoreAtPrice<T> at(s[i], price, how.eps);
                const Index to = row * picks + before;
                indices[to] = static_cast<TokenIndex>(i);
                scores[to] = how.value_of(at.score);
                slopes[to] = at.slope;
                live[to] = true;
            } else if (i < blocks.end(block) && taken[row] + i - taken_before < picks) {
                const Index to = row * picks + taken[row] + i - taken_before;
                indices[to] = static_cast<TokenIndex>(i);
                scores[to] = slopes[to] = T(0);
                live[to] = false;
            }
            chosen += __popc(all);
        }
    }
}

}  // namespace cuda

template <typename T>
void causal_top_k_kernel(const Cuda& policy, const CausalTopK& how, const CausalBlocks& blocks,
                         TokensView<TokenIndex> indices, TokensView<T> scores, TokensView<T> slopes,
                         TokensView<bool> live, TokensView<const T> logits, Mask mask) {
    const Index routes = logits.extent(1), rows = logits.extent(0) * routes, count = blocks.count(),
                picks = indices.extent(2);
    if (rows == 0 || picks == 0) return;
    MatrixTensor<T, Cuda> prices(policy, {2 * rows, count});
    MatrixTensor<TokenIndex, Cuda> counts(policy, {2 * rows, count});
    VectorTensor<TokenIndex, Cuda> taken(policy, {rows});
    const cuda::CausalBlockStates<T> states{prices.data(), prices.data() + rows * count, counts.data(),
                                            counts.data() + rows * count};
    cuda::launch(policy, "causal_prices", cuda::causal_prices<T>, cuda::grid_of_rows(rows, count), cuda::causal_threads,
                 0, how, blocks, states, logits.data(), mask.data(), routes);
    cuda::launch(policy, "causal_budgets", cuda::causal_budgets<T>, cuda::grid(rows), cuda::causal_threads, 0, how,
                 count, picks, states, taken.data());
    cuda::launch(policy, "causal_picks", cuda::causal_picks<T>,
                 cuda::blocks_for(rows * count * cuda::warp_size, cuda::causal_threads), cuda::causal_threads, 0, how,
                 blocks, rows, routes, picks, indices.data(), scores.data(), slopes.data(), live.data(), states,
                 taken.data(), logits.data(), mask.data());
}

}  // namespace colt5
