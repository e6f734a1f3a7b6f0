// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/row_team.cuh>

namespace colt5::cuda {

/// Blocks of a cooperative launch. They exchange partials through global memory, at barriers of the team. The functions
/// are those of ClusterTeam.
class GridTeam {
public:
    static constexpr int threads = grid_team_threads;

    __device__ GridTeam(const TeamBarrier& barrier, const RowSplit& split) : blocks_(barrier.blocks) {
        const Index row_of_launch = blockIdx.x / blocks_;
        row = split.first_row + row_of_launch;
        begin = rank() * split.chunk;
        count = ::max(Index{0}, ::min(split.length - begin, split.chunk));
        partials_ = barrier.partials + row_of_launch * 2 * blocks_;
        arrivals_ = barrier.arrivals + row_of_launch;
        histograms_ = barrier.histograms + row_of_launch * max_histograms * histogram_bins;
    }
    __device__ int blocks() const { return blocks_; }
    __device__ int rank() const { return static_cast<int>(blockIdx.x) % blocks_; }

    template <typename T, typename Combine, typename Then = Identity>
    __device__ auto combine(T value, unsigned thread_count, double identity, Combine&& with, Then&& then = {}) {
        arrivals_wanted_ += static_cast<unsigned>(blocks_);
        return combine_in_block<threads>(value, thread_count, with, [&](const Partial& mine) {
            const Partial* const block_partials = exchange(mine);
            Partial sum{identity, 0};
            for (int i = static_cast<int>(threadIdx.x); i < blocks_; i += warp_size)
                sum = {with(sum.value, __ldcg(&block_partials[i].value)), sum.count + __ldcg(&block_partials[i].count)};
            return then(Partial{warp_reduce(sum.value, with), warp_sum(sum.count)});
        });
    }

    __device__ Index sum_before(unsigned thread_count) {
        arrivals_wanted_ += static_cast<unsigned>(blocks_);
        const auto before = combine_in_block<threads>(0.0f, thread_count, Plus(), [&](const Partial& mine) {
            const Partial* const block_partials = exchange(mine);
            double sum = 0;
            for (int i = static_cast<int>(threadIdx.x); i < rank(); i += warp_size)
                sum += __ldcg(&block_partials[i].count);
            return Partial{0, warp_sum(sum)};
        });
        return static_cast<Index>(before.count);
    }

    __device__ unsigned merge_histogram(const unsigned* histogram, int digit) {
        arrivals_wanted_ += static_cast<unsigned>(blocks_);
        unsigned* const merged = histograms_ + digit * histogram_bins;
        const bool has_bin = threadIdx.x < histogram_bins;
        __syncthreads();
        if (has_bin && histogram[threadIdx.x] != 0) atomicAdd(merged + threadIdx.x, histogram[threadIdx.x]);
        __syncthreads();
        if (threadIdx.x == 0) wait();
        __syncthreads();
        return has_bin ? __ldcg(merged + threadIdx.x) : 0;
    }
    __device__ static void wait_for_readers() {}  // nothing to wait for: the histograms are in global memory

    Index row, begin, count;

private:
    /// As ClusterTeam::exchange.
    __device__ const Partial* exchange(const Partial& mine) const {
        Partial* const block_partials = partials_ + arrivals_wanted_ / static_cast<unsigned>(blocks_) % 2 * blocks_;
        if (threadIdx.x == 0) {
            __stcg(&block_partials[rank()].value, mine.value);
            __stcg(&block_partials[rank()].count, mine.count);
            wait();
        }
        __syncwarp();
        return block_partials;
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
