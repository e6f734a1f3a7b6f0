// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/row_team.cuh>

namespace colt5::cuda {

/// Blocks of a cooperative launch. They exchange partials through global memory, at barriers of the team. The functions
/// are those of ClusterTeam.
class GridTeam {
public:
    static constexpr int threads = grid_team_threads;

    __device__ GridTeam(const TeamBarrier& barrier, const RowPart& part) : blocks_(barrier.blocks) {
        const Index row_of_launch = blockIdx.x / blocks_;
        row = part.first_row + row_of_launch;
        begin = rank() * part.chunk;
        count = ::max(Index{0}, ::min(part.length - begin, part.chunk));
        partials_ = barrier.partials + row_of_launch * 2 * blocks_;
        arrivals_ = barrier.arrivals + row_of_launch;
        histograms_ = barrier.histograms + row_of_launch * most_histograms * histogram_bins;
    }
    __device__ int blocks() const { return blocks_; }
    __device__ int rank() const { return static_cast<int>(blockIdx.x) % blocks_; }

    template <typename T, typename Combine, typename Then = Unchanged>
    __device__ auto combine(T first, unsigned second, double identity, Combine&& with, Then&& then = {}) {
        arrivals_wanted_ += static_cast<unsigned>(blocks_);
        return combine_in_block<threads>(first, second, with, [&](const Partial& mine) {
            const Partial* const of_block = exchange(mine);
            Partial sum{identity, 0};
            for (int i = static_cast<int>(threadIdx.x); i < blocks_; i += warp_size)
                sum = {with(sum.first, __ldcg(&of_block[i].first)), sum.second + __ldcg(&of_block[i].second)};
            return then(Partial{warp_reduce(sum.first, with), warp_sum(sum.second)});
        });
    }

    __device__ Index sum_before(unsigned of_thread) {
        arrivals_wanted_ += static_cast<unsigned>(blocks_);
        const auto before = combine_in_block<threads>(0.0f, of_thread, Plus(), [&](const Partial& mine) {
            const Partial* const of_block = exchange(mine);
            double sum = 0;
            for (int i = static_cast<int>(threadIdx.x); i < rank(); i += warp_size) sum += __ldcg(&of_block[i].second);
            return Partial{0, warp_sum(sum)};
        });
        return static_cast<Index>(before.second);
    }

    __device__ unsigned merge_histogram(const unsigned* of_mine, int digit) {
        arrivals_wanted_ += static_cast<unsigned>(blocks_);
        unsigned* const of_all = histograms_ + digit * histogram_bins;
        const bool has_bin = threadIdx.x < histogram_bins;
        __syncthreads();
        if (has_bin && of_mine[threadIdx.x] != 0) atomicAdd(of_all + threadIdx.x, of_mine[threadIdx.x]);
        __syncthreads();
        if (threadIdx.x == 0) wait();
        __syncthreads();
        return has_bin ? __ldcg(of_all + threadIdx.x) : 0;
    }
    __device__ static void stay() {}  // nothing to wait for: the histograms are in global memory

    Index row, begin, count;

private:
    /// As ClusterTeam::exchange.
    __device__ const Partial* exchange(const Partial& mine) const {
        Partial* const of_block = partials_ + arrivals_wanted_ / static_cast<unsigned>(blocks_) % 2 * blocks_;
        if (threadIdx.x == 0) {
            __stcg(&of_block[rank()].first, mine.first);
            __stcg(&of_block[rank()].second, mine.second);
            wait();
        }
        __syncwarp();
        return of_block;
    }
    /// Arrives, then waits until one thread of each block of the team has arrived. What the blocks wrote before is
    /// visible afterwards.
    __device__ void wait() const {
        __threadfence();
        atomicAdd(arrivals_, 1u);
        while (*static_cast<volatile unsigned*>(arrivals_) < arrivals_wanted_) {
        }
        __threadfence();
    }
    Partial* partials_;
    unsigned *arrivals_, *histograms_;
    int blocks_;
    unsigned arrivals_wanted_ = 0;  // at which the current barrier opens: barriers so far times blocks
};

}  // namespace colt5::cuda
