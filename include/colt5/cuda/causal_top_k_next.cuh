// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <colt5/cuda/causal_top_k.cuh>
#include <colt5/cuda/kernel.cuh>
#include <colt5/op/causal_top_k_next.hpp>

namespace colt5 {

namespace cuda {

/// The tensors of NextCausalPicks and of CausalTopKState.
template <typename T>
struct NextPicksPointers {
    TokenIndex *indices, *positions;
    T* scores;
    bool* live;
    T *history, *block;
    std::int64_t* progress;
};

/// One block of threads for each row: block by block of tokens it finds the price, then one warp chooses.
template <typename T>
__global__ void __launch_bounds__(causal_threads)
    next_causal_picks(CausalTopK how, NextPicksPointers<T> to, const T* logits, const bool* mask, Index routes,
                      Index length, Index picks) {
    using Key = typename LogitRank<T>::type;
    __shared__ Key ranks[CausalTopK::largest_block];
    __shared__ T below[2 * CausalTopK::largest_block];
    __shared__ Index taken_of_block;
    const Index row = blockIdx.x, size = how.block_size, thread = threadIdx.x;
    const T* const s = logits + row * length;
    T *const history = to.history + row * size, *const of_block = to.block + row * 2;
    TokenIndex* const indices = to.indices + row * picks;
    const RowMask real(mask, row, routes, length);
    auto at = CausalProgress::load(to.progress + row * CausalProgress::size);
    const Index before = at.length;
    CausalPrice<T> of{of_block[0], of_block[1]};

    int mine = 0;
    for (Index i = thread; i < length; i += causal_threads) mine += real[i];
    const Index count = block_sum(mine);
    Index chosen = 0;
    for (Index first = 0; first < count;) {
        __syncthreads();  // the previous iteration has written to history and read taken_of_block
        if (at.begins_block(size)) {
            for (Index i = thread; i < size; i += causal_threads)
                ranks[i] = i < at.length ? LogitRank<T>::of(history[i]) : LogitRank<T>::masked;
            of = price_of_history(how, ranks, static_cast<int>(at.length < size ? at.length : size), below);
            at.begin_block(how);
            __syncthreads();
        }
        const Index rest = at.rest_of_block(size), end = rest < count - first ? first + rest : count;
        for (Index i = first + thread; i < end; i += causal_threads) history[(at.length + i - first) % size] = s[i];
        const Index limit = at.left < picks - chosen ? Index{at.left} : picks - chosen;
        if (thread < warp_size) {
            const auto least = LogitRank<T>::of(of.threshold);
            const auto lanes_before = (1u << thread) - 1;
            Index candidates = 0;
            for (Index group = first; group < end && candidates < limit; group += warp_size) {
                const Index i = group + thread;
                const bool candidate = i < end && LogitRank<T>::of(s[i]) <= least;
                const unsigned all = __ballot_sync(0xffffffffu, candidate);
                const Index number = candidates + __popc(all & lanes_before);
                if (candidate && number < limit) {
                    const Index place = chosen + number;
                    indices[place] = static_cast<TokenIndex>(i);
                    to.scores[row * picks + place] = how.value_of(ScoreAtPrice<T>(s[i], of.price, how.eps).score);
                    to.live[row * picks + place] = true;
                }
                candidates += __popc(all);
            }
            if (thread == 0) taken_of_block = candidates < limit ? candidates : limit;
        }
        __syncthreads();
        chosen += taken_of_block;
        at.advance(how, end - first, taken_of_block);
        first = end;
    }
    __syncthreads();
    for (Index i = chosen + thread; i < picks; i += causal_threads) {
        indices[i] = unchosen_token(indices, chosen, i - chosen);
        to.scores[row * picks + i] = T(0);
        to.live[row * picks + i] = false;
    }
    __syncthreads();
    for (Index i = thread; i < picks; i += causal_threads)
        to.positions[row * picks + i] = static_cast<TokenIndex>(before + indices[i]);
    if (thread != 0) return;
    of_block[0] = of.threshold;
    of_block[1] = of.price;
    at.store(to.progress + row * CausalProgress::size);
}

}  // namespace cuda

template <typename T>
void causal_top_k_next_kernel(const Cuda& policy, const CausalTopK& how, NextCausalPicks<T, Cuda>* next,
                              TokensView<T> history, TokensView<T> block, TokensView<std::int64_t> progress,
                              TokensView<const T> logits, Mask mask) {
    const Index routes = logits.extent(1), rows = logits.extent(0) * routes;
    if (rows == 0) return;
    cuda::launch(policy, "next_causal_picks", cuda::next_causal_picks<T>, cuda::grid(rows), cuda::causal_threads, 0,
                 how,
                 cuda::NextPicksPointers<T>{next->indices.data(), next->positions.data(), next->scores.data(),
                                            next->live.data(), history.data(), block.data(), progress.data()},
                 logits.data(), mask.data(), routes, logits.extent(2), next->indices.extent(2));
}

}  // namespace colt5
