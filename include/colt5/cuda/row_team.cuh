// SPDX-License-Identifier: MIT
#pragma once

#include <cooperative_groups.h>

#include <algorithm>
#include <bit>

#include <colt5/cuda/launch.cuh>

/// Teams of blocks that work on one long row together, each on a part of it, and tell each other sums in between.
///
/// A team is a cluster, whose blocks write to each other's shared memory, wherever the row fits there; a single block
/// on devices without clusters; or else several blocks that are on the device at the same time and meet in global
/// memory. How a row is cut depends on its length alone, and so do the bits of all sums.
namespace colt5::cuda {

inline constexpr int team_threads = 1024;
inline constexpr int largest_cluster = 8;
inline constexpr int histogram_bins = 2048;  // two for every thread
inline constexpr int most_histograms = 9;    // digits of 11 bits of the longest keys, which have 64 + 31

/// What one block tells the others.
struct Partial {
    double first, second;
};

/// Which rows a launch has, and what a block has of its row.
struct RowPart {
    Index first_row, rows, length, chunk;
    bool on_chip;  ///< a chunk fits into shared memory
};

/// What blocks that are no cluster need to meet, zeroed before the launch except for `partials`; one of each a row.
struct Meeting {
    Partial* partials;     // (rows, 2, blocks)
    unsigned* arrivals;    // (rows)
    unsigned* histograms;  // (rows, most_histograms, bins)
    int blocks;
};

/// All threads of all blocks of a team make the same calls.
class ClusterTeam {
public:
    __device__ ClusterTeam(const Meeting&, const RowPart& part) {
        row = part.first_row + blockIdx.x / blocks();
        begin = rank() * part.chunk;
        count = max(Index{0}, min(part.length - begin, part.chunk));
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

    /// Combines the blocks' partials in order of rank; `mine` is that of thread 0 … blocks − 1 of the block.
    template <typename Combine>
    __device__ Partial combine(const Partial& mine, Combine&& with) {
        const Partial* const box = exchange(mine);
        Partial total = box[0];
        for (int i = 1; i < blocks(); ++i) total = with(total, box[i]);
        return total;
    }

    /// Σ over the blocks of lower rank.
    __device__ Index sum_before(Index mine) {
        const Partial* const box = exchange({static_cast<double>(mine), 0});
        double sum = 0;
        for (int i = 0; i < rank(); ++i) sum += box[i].first;
        return static_cast<Index>(sum);
    }

    /// The team's counts in the two bins of this thread. Another exchange must follow before the kernel ends, and the
    /// histogram must not change until the one after that.
    __device__ uint2 merge_histogram(unsigned* of_mine, int) {
        sync();
        uint2 sum{0, 0};
        for (int i = 0; i < blocks(); ++i) {
            const uint2 bins = reinterpret_cast<const uint2*>(of_block(of_mine, i))[threadIdx.x];
            sum.x += bins.x;
            sum.y += bins.y;
        }
        return sum;
    }

    Index row, begin, count;

private:
    __device__ const Partial* exchange(const Partial& mine) {
        __shared__ Partial inbox[2][largest_cluster];  // two: some blocks still read the one before
        Partial* const box = inbox[exchanges_++ % 2];
        if (static_cast<int>(threadIdx.x) < blocks()) *of_block(box + rank(), static_cast<int>(threadIdx.x)) = mine;
        sync();
        return box;
    }
    template <typename T>
    __device__ static T* of_block(T* shared, int block) {
#if __CUDA_ARCH__ >= 900
        return cooperative_groups::this_cluster().map_shared_rank(shared, static_cast<unsigned>(block));
#else
        return shared;
#endif
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

/// The same for blocks that meet in global memory.
class GridTeam {
public:
    __device__ GridTeam(const Meeting& meeting, const RowPart& part) : blocks_(meeting.blocks) {
        const Index row_of_launch = blockIdx.x / blocks_;
        row = part.first_row + row_of_launch;
        begin = rank() * part.chunk;
        count = max(Index{0}, min(part.length - begin, part.chunk));
        partials_ = meeting.partials + row_of_launch * 2 * blocks_;
        arrivals_ = meeting.arrivals + row_of_launch;
        histograms_ = meeting.histograms + row_of_launch * most_histograms * histogram_bins;
    }
    __device__ int blocks() const { return blocks_; }
    __device__ int rank() const { return static_cast<int>(blockIdx.x) % blocks_; }

    template <typename Combine>
    __device__ Partial combine(const Partial& mine, Combine&& with) {
        __shared__ Partial total;
        const Partial* const box = exchange(mine);
        if (threadIdx.x < warp_size) {
            const int lanes = min(blocks_, warp_size), lane = min(static_cast<int>(threadIdx.x), lanes - 1);
            Partial sum{__ldcg(&box[lane].first), __ldcg(&box[lane].second)};
            for (int i = lane + warp_size; i < blocks_; i += warp_size)
                sum = with(sum, Partial{__ldcg(&box[i].first), __ldcg(&box[i].second)});
            for (int offset = 1; offset < warp_size; offset *= 2) {
                const Partial other{__shfl_down_sync(0xffffffffu, sum.first, offset),
                                    __shfl_down_sync(0xffffffffu, sum.second, offset)};
                if (static_cast<int>(threadIdx.x) + offset < lanes) sum = with(sum, other);
            }
            if (threadIdx.x == 0) total = sum;
        }
        __syncthreads();
        return total;
    }

    __device__ Index sum_before(Index mine) {
        const Partial* const box = exchange({static_cast<double>(mine), 0});
        double sum = 0;
        for (int i = static_cast<int>(threadIdx.x) % warp_size; i < rank(); i += warp_size)
            sum += __ldcg(&box[i].first);
        return static_cast<Index>(warp_sum(sum));
    }

    __device__ uint2 merge_histogram(const unsigned* of_mine, int pass) {
        unsigned* const of_all = histograms_ + pass * histogram_bins;
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x); i < histogram_bins; i += team_threads)
            if (of_mine[i] != 0) atomicAdd(of_all + i, of_mine[i]);
        sync();
        return __ldcg(reinterpret_cast<const uint2*>(of_all) + threadIdx.x);
    }

    Index row, begin, count;

private:
    __device__ const Partial* exchange(const Partial& mine) {
        Partial* const box = partials_ + (exchanges_++ % 2) * blocks_;
        if (threadIdx.x == 0) {
            __stcg(&box[rank()].first, mine.first);
            __stcg(&box[rank()].second, mine.second);
        }
        sync();
        return box;
    }
    __device__ void sync() {
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(arrivals_, 1u);
            meetings_ += static_cast<unsigned>(blocks_);
            while (*static_cast<volatile unsigned*>(arrivals_) < meetings_) {
            }
            __threadfence();
        }
        __syncthreads();
    }
    Partial* partials_;
    unsigned *arrivals_, *histograms_;
    int blocks_, exchanges_ = 0;
    unsigned meetings_ = 0;
};

struct PartialPlus {
    __device__ Partial operator()(const Partial& a, const Partial& b) const {
        return {a.first + b.first, a.second + b.second};
    }
};

/// Launches a kernel (Meeting, RowPart, parameters…) for teams of 1024 threads a block over `rows` rows of `length`
/// Elements, which each block may keep in dynamic shared memory. The kernel comes twice: for either kind of team.
template <typename Element, typename... Parameters, typename... Arguments>
void launch_teams(const Cuda& policy, const char* name, void (*cluster_kernel)(Meeting, RowPart, Parameters...),
                  void (*grid_kernel)(Meeting, RowPart, Parameters...), Index rows, Index length,
                  const Arguments&... arguments) {
    if (rows == 0 || length == 0) return;
    const DeviceGuard guard(policy.device());
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, cluster_kernel), name);
    int shared_limit = 0, processors = 0;
    check(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, policy.device()), name);
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, policy.device()), name);
    shared_limit -= static_cast<int>(attributes.sharedSizeBytes);

    const auto start = [&](auto* kernel, const Meeting& meeting, const RowPart& part, int blocks,
                           cudaLaunchAttributeID how) {
        const std::size_t shared = part.on_chip ? static_cast<std::size_t>(part.chunk) * sizeof(Element) : 0;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
              name);
        cudaLaunchAttribute attribute{};
        attribute.id = how;
        if (how == cudaLaunchAttributeClusterDimension) {
            attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
            attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        } else {
            attribute.val.cooperative = 1;
        }
        cudaLaunchConfig_t config{};
        config.gridDim = grid(part.rows * blocks);
        config.blockDim = dim3(team_threads);
        config.dynamicSmemBytes = shared;
        config.stream = policy.stream();
        config.attrs = &attribute;
        config.numAttrs = blocks > 1 ? 1 : 0;
        check(cudaLaunchKernelEx(&config, kernel, meeting, part, static_cast<Parameters>(arguments)...), name);
    };

    constexpr Index per_block = 4096;
    const auto bytes = [&](int blocks) { return divide_up(length, blocks) * static_cast<Index>(sizeof(Element)); };
    const int most = attributes.ptxVersion >= 90 ? largest_cluster : 1;
    int blocks = 1;
    while (blocks < most && (length > blocks * per_block || bytes(blocks) > shared_limit)) blocks *= 2;
    if (bytes(blocks) <= shared_limit) {
        start(cluster_kernel, Meeting{}, RowPart{0, rows, length, divide_up(length, blocks), true}, blocks,
              cudaLaunchAttributeClusterDimension);
        return;
    }

    constexpr Index most_blocks = 64;
    blocks = static_cast<int>(std::min({divide_up(length, 2 * per_block), most_blocks, Index{processors}}));
    RowPart part{0, 0, length, divide_up(length, blocks), bytes(blocks) <= shared_limit};
    const Index rows_at_once = std::min<Index>(rows, processors / blocks);
    MatrixTensor<Partial, Cuda> partials(policy, {rows_at_once, 2 * blocks});
    VectorTensor<unsigned, Cuda> counters(policy, {rows_at_once * (1 + most_histograms * histogram_bins)});
    const Meeting meeting{partials.data(), counters.data() + rows_at_once * most_histograms * histogram_bins,
                          counters.data(), blocks};
    for (; part.first_row < rows; part.first_row += rows_at_once) {
        part.rows = std::min(rows_at_once, rows - part.first_row);
        check(cudaMemsetAsync(counters.data(), 0, static_cast<std::size_t>(counters.size()) * sizeof(unsigned),
                              policy.stream()),
              name);
        start(grid_kernel, meeting, part, blocks, cudaLaunchAttributeCooperative);
    }
}

}  // namespace colt5::cuda
