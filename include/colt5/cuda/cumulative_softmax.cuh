// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/grid_team.cuh>
#include <colt5/cuda/kernel.cuh>
#include <colt5/cuda/masked_row.cuh>
#include <colt5/cuda/top_k.cuh>
#include <colt5/cuda/zero.cuh>
#include <colt5/op/cumulative_softmax.hpp>

namespace colt5 {

namespace cuda {

/// A row of exponentials and, for every pick, the sum of the exponentials of all tokens that rank at or below it. Both
/// kernels use it.
template <typename Team, typename T>
class CumulativeRow {
public:
    __device__ CumulativeRow(const TeamBarrier& barrier, const RowSplit& split, const T* logits, const bool* mask,
                             const TokenIndex* indices, Index routes, Index picks, double temperature)
        : row(barrier, split, logits, mask, routes),
          index(indices + row.team.row * picks),
          logit_(logits + row.team.row * split.length),
          real_(mask, row.team.row, routes, split.length),
          picks_(picks),
          top_(row.largest == -row.infinity ? T(0) : finite(row.largest)),
          inverse_(static_cast<T>(1 / temperature)) {
        // The picks are the first tokens in the order of choice. Masked tokens add 0, so their order does not matter.
        const TokenIndex last = index[picks - 1];
        const auto last_rank = real_[last] ? Rank<T>::of(logit_[last]) : Rank<T>::masked;
        T sum = 0;
        for (Index i = threadIdx.x; i < row.team.count; i += Team::threads) {
            const auto rank = Rank<T>::of(row[i]);
            const bool chosen = rank < last_rank || (rank == last_rank && row.team.begin + i <= last);
            if (!chosen) sum += exponential(i);
        }
        rest_ = row.team.combine(sum, 0, 0, Plus()).value;
    }
    /// That of entry i of this block's chunk.
    __device__ T exponential(Index i) const { return ::exp((finite(row[i]) - top_) * inverse_); }
    __device__ T exponential_of_pick(Index pick) const {
        const TokenIndex i = index[pick];
        return is_real(pick) ? ::exp((finite(logit_[i]) - top_) * inverse_) : T(0);
    }
    __device__ bool is_real(Index pick) const { return real_[index[pick]]; }

    /// Calls body(pick, its exponential, sum of those that rank at or below it) for every pick, the last ones first.
    /// One block calls it.
    template <typename Body>
    __device__ void for_each_pick(Body&& body) const {
        __shared__ double carry;
        double below = rest_;
        for (Index done = 0; done < picks_; done += Team::threads) {
            const Index pick = picks_ - 1 - done - threadIdx.x;
            const T e = pick >= 0 ? exponential_of_pick(pick) : T(0);
            const double sum = below + block_inclusive_sum<Team::threads>(static_cast<double>(e));
            if (pick >= 0) body(pick, e, sum);
            if (threadIdx.x == Team::threads - 1) carry = sum;
            __syncthreads();
            below = carry;
            __syncthreads();
        }
    }

    MaskedRow<Team, T> row;
    const TokenIndex* index;

private:
    __device__ static T finite(T s) { return ::min(s, std::numeric_limits<T>::max()); }

    const T* logit_;
    RowMask real_;
    Index picks_;
    T top_, inverse_;
    double rest_;  // Σ over the tokens that are not picked
};

template <typename Team, typename T>
__global__ void __launch_bounds__(Team::threads)
    cumulative_softmax(TeamBarrier barrier, RowSplit split, T* scores, const T* logits, const TokenIndex* indices,
                       const bool* mask, Index routes, Index picks, double temperature) {
    const CumulativeRow<Team, T> cumulative(barrier, split, logits, mask, indices, routes, picks, temperature);
    const Team& team = cumulative.row.team;
    if (team.rank() != 0) return;
    if (cumulative.row.has_nan()) {
        for (Index pick = threadIdx.x; pick < picks; pick += Team::threads)
            scores[team.row * picks + pick] = nan_if<T>(cumulative.is_real(pick));
        return;
    }
    cumulative.for_each_pick([&](Index pick, T e, double sum) {
        scores[team.row * picks + pick] = static_cast<T>(static_cast<double>(e) / ::max(sum, cumulative_softmax_floor));
    });
}

/// `sums` (rows, picks) is scratch.
template <typename Team, typename T>
__global__ void __launch_bounds__(Team::threads)
    cumulative_softmax_vjp(TeamBarrier barrier, RowSplit split, T* d_logits, double* sums, const T* d_scores,
                           const T* logits, const TokenIndex* indices, const bool* mask, Index routes, Index picks,
                           double temperature) {
    CumulativeRow<Team, T> cumulative(barrier, split, logits, mask, indices, routes, picks, temperature);
    Team& team = cumulative.row.team;
    T* const ds = d_logits + team.row * split.length + team.begin;
    if (cumulative.row.has_nan()) {
        for (Index i = threadIdx.x; i < team.count; i += Team::threads) ds[i] = nan_if<T>(cumulative.row.is_real(i));
        return;
    }
    double* const sum_of_pick = sums + team.row * picks;  // afterwards the gradient of its logit
    double all = 0;                                       // Σ c_j over every pick
    if (team.rank() == 0) {
        cumulative.for_each_pick([&](Index pick, T, double sum) { sum_of_pick[pick] = sum; });
        __syncthreads();
        __shared__ double carry;
        for (Index first = 0; first < picks; first += Team::threads) {
            const Index pick = first + threadIdx.x;
            const double e = pick < picks ? static_cast<double>(cumulative.exponential_of_pick(pick)) : 0;
            double g = 0, sum = 1, c = 0;
            if (e != 0) {  // not a masked token, whose gradient may be anything
                g = static_cast<double>(d_scores[team.row * picks + pick]);
                sum = sum_of_pick[pick];
                if (sum >= cumulative_softmax_floor) c = -g * e / (sum * sum);
            }
            const double above = all + block_inclusive_sum<Team::threads>(c);
            if (pick < picks)  // `above` may be infinite
                sum_of_pick[pick] = e == 0 ? 0 : e / temperature * (g / ::max(sum, cumulative_softmax_floor) + above);
            if (threadIdx.x == Team::threads - 1) carry = above;
            __syncthreads();
            all = carry;
            __syncthreads();
        }
        __threadfence();  // before `combine` tells the other blocks, which read sum_of_pick
    }
    all = team.combine(threadIdx.x == 0 ? all : 0.0, 0, 0, Plus()).value;
    for (Index i = threadIdx.x; i < team.count; i += Team::threads) {
        const T e = cumulative.exponential(i);
        ds[i] = e == T(0) ? T(0) : static_cast<T>(static_cast<double>(e) / temperature * all);
    }
    __syncthreads();
    for (Index pick = threadIdx.x; pick < picks; pick += Team::threads) {
        const Index i = cumulative.index[pick] - team.begin;
        if (i >= 0 && i < team.count) ds[i] = static_cast<T>(__ldcg(sum_of_pick + pick));
    }
}

}  // namespace cuda

template <typename T>
void cumulative_softmax_kernel(const Cuda& policy, TokensView<T> scores, TokensView<const T> logits,
                               TokensView<const TokenIndex> indices, Mask mask, double temperature) {
    if (indices.size() == 0) return;
    cuda::launch_teams<T>(policy, "cumulative_softmax", cuda::cumulative_softmax<cuda::ClusterTeam, T>,
                          cuda::cumulative_softmax<cuda::GridTeam, T>, logits.extent(0) * logits.extent(1),
                          logits.extent(2), scores.data(), logits.data(), indices.data(), mask.data(), logits.extent(1),
                          indices.extent(2), temperature);
}

template <typename T>
void cumulative_softmax_vjp_kernel(const Cuda& policy, TokensView<T> d_logits, TokensView<const T> d_scores,
                                   TokensView<const T> logits, TokensView<const TokenIndex> indices, Mask mask,
                                   double temperature) {
    if (indices.size() == 0) {
        zero_kernel(policy, VectorView<T>(d_logits.data(), {d_logits.size()}));
        return;
    }
    VectorTensor<double, Cuda> sums(policy, {indices.size()});
    cuda::launch_teams<T>(policy, "cumulative_softmax_vjp", cuda::cumulative_softmax_vjp<cuda::ClusterTeam, T>,
                          cuda::cumulative_softmax_vjp<cuda::GridTeam, T>, logits.extent(0) * logits.extent(1),
                          logits.extent(2), d_logits.data(), sums.data(), d_scores.data(), logits.data(),
                          indices.data(), mask.data(), logits.extent(1), indices.extent(2), temperature);
}

}  // namespace colt5
