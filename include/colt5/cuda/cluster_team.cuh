// SPDX-License-Identifier: MIT
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

#include <colt5/cuda/row_part.cuh>
#include <colt5/cuda/shared_memory.cuh>

namespace colt5::cuda {

inline constexpr int largest_cluster = 8;

/// The blocks of a cluster, which write to each other's shared memory; a single block on devices without clusters. All
/// threads of all blocks of a team make the same calls.
class ClusterTeam {
public:
    static constexpr int threads = 512;  // of a block; more threads take longer at each barrier

    __device__ ClusterTeam(const TeamBarrier&, const RowPart& part) {
        row = part.first_row + blockIdx.x / blocks();
        begin = rank() * part.chunk;
        count = ::max(Index{0}, ::min(part.length - begin, part.chunk));
#if __CUDA_ARCH__ >= 900
        if (blocks() == 1) return;
        if (threadIdx.x == 0) {
            for (std::uint64_t& full : inbox().full)
                asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(&full)));
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        sync();
#endif
    }
    __device__ static int blocks() {
#if __CUDA_ARCH__ >= 900
        return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
        return 1;
#endif
    }
    __device__ static int rank() {
#if __CUDA_ARCH__ >= 900
        return static_cast<int>(cooperative_groups::this_cluster().block_rank());
#else
        return 0;
#endif
    }

    /// Reduces `first` over all threads of the team by `with`, whose identity element is the third argument, sums
    /// `second`, and returns then({both results}) to every thread.
    template <typename T, typename Combine, typename Then = Unchanged>
    __device__ auto combine(T first, unsigned second, double, Combine&& with, Then&& then = {}) {
        const int exchange_index = exchanges_++;
        return combine_in_block<threads>(first, second, with, [&](const Partial& mine) {
            const Partial* const of_block = exchange(mine, exchange_index);
            Partial total = of_block[0];
            for (int i = 1; i < blocks(); ++i)
                total = {with(total.first, of_block[i].first), total.second + of_block[i].second};
            return then(total);
        });
    }

    /// Σ of the counts of the blocks of lower rank.
    __device__ Index sum_before(unsigned of_thread) {
        const int exchange_index = exchanges_++;
        const auto before = combine_in_block<threads>(0.0f, of_thread, Plus(), [&](const Partial& mine) {
            const Partial* const of_block = exchange(mine, exchange_index);
            Partial total{0, 0};
            for (int i = 0; i < rank(); ++i) total.second += of_block[i].second;
            return total;
        });
        return static_cast<Index>(before.second);
    }

    /// Sums the histograms of all blocks. Each thread gets the count of its bin, or 0 if it has none. Other blocks may
    /// read `of_mine` until the next merge returns: do not change it before, and call `stay` before the kernel ends.
    __device__ unsigned merge_histogram(unsigned* of_mine, int) {
        sync();
        unsigned sum = 0;
#if __CUDA_ARCH__ >= 900
        if (threadIdx.x < histogram_bins)
#pragma unroll
            for (int i = 0; i < largest_cluster; ++i)
                if (i < blocks()) sum += cooperative_groups::this_cluster().map_shared_rank(of_mine, i)[threadIdx.x];
#else
        if (threadIdx.x < histogram_bins) sum = of_mine[threadIdx.x];
#endif
        return sum;
    }
    /// Waits until no other block reads this one's histograms any more.
    __device__ static void stay() {
        if (blocks() > 1) sync();
    }

    Index row, begin, count;

private:
    /// The partials that the blocks send to this one. Exchanges use two sets alternately, since one block may be an
    /// exchange ahead of another.
    struct Inbox {
        Partial partials[2][largest_cluster];
        std::uint64_t full[2];  // mbarriers that wait for the bytes of all partials
    };
    __device__ static Inbox& inbox() {
        __shared__ Inbox box;
        return box;
    }
    /// Sends this block's partial to all blocks, and returns those of all blocks. The first warp calls it.
    __device__ static const Partial* exchange(const Partial& mine, int exchange_index) {
        Partial* const partials = inbox().partials[exchange_index % 2];
        const int lane = static_cast<int>(threadIdx.x);
#if __CUDA_ARCH__ >= 900
        if (blocks() > 1) {
            const unsigned full = shared_address(&inbox().full[exchange_index % 2]);
            if (lane == 0)
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full),
                             "r"(blocks() * static_cast<int>(sizeof(Partial)))
                             : "memory");
            if (lane < blocks())
                asm volatile(
                    "{\n"
                    ".reg .b32 there, full_there;\n"
                    "mapa.shared::cluster.u32 there, %0, %2;\n"
                    "mapa.shared::cluster.u32 full_there, %1, %2;\n"
                    "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f64 [there], {%3, %4}, [full_there];\n"
                    "}\n" ::"r"(shared_address(partials + rank())),
                    "r"(full), "r"(lane), "d"(mine.first), "d"(mine.second)
                    : "memory");
            asm volatile(
                "{\n"
                ".reg .pred done;\n"
                "again:\n"
                "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                "@!done bra again;\n"
                "}\n" ::"r"(full),
                "r"(exchange_index / 2 % 2)
                : "memory");
            return partials;
        }
#endif
        if (lane == 0) partials[0] = mine;
        __syncwarp();
        return partials;
    }
    __device__ static void sync() {
#if __CUDA_ARCH__ >= 900
        cooperative_groups::this_cluster().sync();
#else
        __syncthreads();
#endif
    }
    int exchanges_ = 0;
};

}  // namespace colt5::cuda
