// SPDX-License-Identifier: MIT
#pragma once

#include <cooperative_groups.h>

#include <algorithm>
#include <cstdint>

#include <colt5/cuda/launch.cuh>

/// Teams of blocks that work on one long row together, each on a part of it, and tell each other sums in between.
///
/// A team is a cluster, whose blocks write to each other's shared memory, wherever the row fits there; a single block
/// on devices without clusters; or else several blocks that are on the device at the same time and meet in global
/// memory. How a row is cut depends on its length alone, and so do the bits of all sums.
namespace colt5::cuda {

inline constexpr int largest_cluster = 8;
inline constexpr int histogram_bins = 256;  // not more than a block has threads
inline constexpr int most_histograms = 12;  // digits of 8 bits of the longest keys, which have 64 + 31

/// What one block tells the others.
struct alignas(16) Partial {
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

struct Unchanged {
    __device__ Partial operator()(const Partial& partial) const { return partial; }
};

/// Combines a value of each thread of a block by `with`, and adds up counts; then across(partial of the block), which
/// the first warp computes, is what every thread gets. In a fixed order: the same bits every time.
template <int threads, typename T, typename Combine, typename Across>
__device__ auto combine_in_block(T first, unsigned second, Combine&& with, Across&& across) {
    constexpr int warps = threads / warp_size;  // a power of two
    using Result = decltype(across(Partial{}));
    __shared__ T first_of_warp[warps];
    __shared__ unsigned second_of_warp[warps];
    __shared__ Result result;
    const int warp = static_cast<int>(threadIdx.x) / warp_size, lane = static_cast<int>(threadIdx.x) % warp_size;
    first = warp_reduce(first, with);
    second = __reduce_add_sync(0xffffffffu, second);
    if (lane == 0) {
        first_of_warp[warp] = first;
        second_of_warp[warp] = second;
    }
    __syncthreads();
    if (warp == 0) {
        first = first_of_warp[lane % warps];
        for (int offset = warps / 2; offset > 0; offset /= 2)
            first = with(first, __shfl_xor_sync(0xffffffffu, first, offset));
        second = __reduce_add_sync(0xffffffffu, lane < warps ? second_of_warp[lane] : 0);
        const Result of_all = across(Partial{static_cast<double>(first), static_cast<double>(second)});
        if (lane == 0) result = of_all;
    }
    __syncthreads();
    return result;
}

/// All threads of all blocks of a team make the same calls.
class ClusterTeam {
public:
    static constexpr int threads = 512;  // of a block; more take longer to meet

    __device__ ClusterTeam(const Meeting&, const RowPart& part) {
        row = part.first_row + blockIdx.x / blocks();
        begin = rank() * part.chunk;
        count = ::max(Index{0}, ::min(part.length - begin, part.chunk));
#if __CUDA_ARCH__ >= 900
        if (blocks() == 1) return;
        if (threadIdx.x == 0) {
            for (std::uint64_t& full : inbox().full)
                asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(address(&full)));
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

    /// Combines a value of each thread of the team by `with`, whose identity is `identity`, and adds up counts; what
    /// every thread gets is then(these).
    template <typename T, typename Combine, typename Then = Unchanged>
    __device__ auto combine(T first, unsigned second, double, Combine&& with, Then&& then = {}) {
        const int turn = exchanges_++;
        return combine_in_block<threads>(first, second, with, [&](const Partial& mine) {
            const Partial* const of_block = exchange(mine, turn);
            Partial total = of_block[0];
            for (int i = 1; i < blocks(); ++i)
                total = {with(total.first, of_block[i].first), total.second + of_block[i].second};
            return then(total);
        });
    }

    /// Σ of the counts of the blocks of lower rank.
    __device__ Index sum_before(unsigned of_thread) {
        const int turn = exchanges_++;
        const auto before = combine_in_block<threads>(0.0f, of_thread, Plus(), [&](const Partial& mine) {
            const Partial* const of_block = exchange(mine, turn);
            Partial total{0, 0};
            for (int i = 0; i < rank(); ++i) total.second += of_block[i].second;
            return total;
        });
        return static_cast<Index>(before.second);
    }

    /// The team's count in the bin of this thread, 0 for threads that have none. The histogram must not change until
    /// the next but one merge, nor the kernel end before `stay`.
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
    /// Until no other block reads this one's histograms any more.
    __device__ static void stay() {
        if (blocks() > 1) sync();
    }

    Index row, begin, count;

private:
    /// What the blocks send to this one: in turns, since some may be one exchange ahead.
    struct Inbox {
        Partial partials[2][largest_cluster];
        std::uint64_t full[2];  // barriers that wait for the bytes of all partials
    };
    __device__ static Inbox& inbox() {
        __shared__ Inbox box;
        return box;
    }
    __device__ static unsigned address(const void* shared) {
        return static_cast<unsigned>(__cvta_generic_to_shared(shared));
    }

    /// The partials of all blocks; by the first warp.
    __device__ static const Partial* exchange(const Partial& mine, int turn) {
        Partial* const partials = inbox().partials[turn % 2];
        const int lane = static_cast<int>(threadIdx.x);
#if __CUDA_ARCH__ >= 900
        if (blocks() > 1) {
            const unsigned full = address(&inbox().full[turn % 2]);
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
                    "}\n" ::"r"(address(partials + rank())),
                    "r"(full), "r"(lane), "d"(mine.first), "d"(mine.second)
                    : "memory");
            asm volatile(
                "{\n"
                ".reg .pred done;\n"
                "again:\n"
                "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                "@!done bra again;\n"
                "}\n" ::"r"(full),
                "r"(turn / 2 % 2)
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

/// The same for blocks that meet in global memory.
class GridTeam {
public:
    static constexpr int threads = 1024;

    __device__ GridTeam(const Meeting& meeting, const RowPart& part) : blocks_(meeting.blocks) {
        const Index row_of_launch = blockIdx.x / blocks_;
        row = part.first_row + row_of_launch;
        begin = rank() * part.chunk;
        count = ::max(Index{0}, ::min(part.length - begin, part.chunk));
        partials_ = meeting.partials + row_of_launch * 2 * blocks_;
        arrivals_ = meeting.arrivals + row_of_launch;
        histograms_ = meeting.histograms + row_of_launch * most_histograms * histogram_bins;
    }
    __device__ int blocks() const { return blocks_; }
    __device__ int rank() const { return static_cast<int>(blockIdx.x) % blocks_; }

    template <typename T, typename Combine, typename Then = Unchanged>
    __device__ auto combine(T first, unsigned second, double identity, Combine&& with, Then&& then = {}) {
        meetings_ += static_cast<unsigned>(blocks_);
        return combine_in_block<threads>(first, second, with, [&](const Partial& mine) {
            const Partial* const of_block = exchange(mine);
            Partial sum{identity, 0};
            for (int i = static_cast<int>(threadIdx.x); i < blocks_; i += warp_size)
                sum = {with(sum.first, __ldcg(&of_block[i].first)), sum.second + __ldcg(&of_block[i].second)};
            return then(Partial{warp_reduce(sum.first, with), warp_sum(sum.second)});
        });
    }

    __device__ Index sum_before(unsigned of_thread) {
        meetings_ += static_cast<unsigned>(blocks_);
        const auto before = combine_in_block<threads>(0.0f, of_thread, Plus(), [&](const Partial& mine) {
            const Partial* const of_block = exchange(mine);
            double sum = 0;
            for (int i = static_cast<int>(threadIdx.x); i < rank(); i += warp_size) sum += __ldcg(&of_block[i].second);
            return Partial{0, warp_sum(sum)};
        });
        return static_cast<Index>(before.second);
    }

    __device__ unsigned merge_histogram(const unsigned* of_mine, int pass) {
        meetings_ += static_cast<unsigned>(blocks_);
        unsigned* const of_all = histograms_ + pass * histogram_bins;
        const bool has_bin = threadIdx.x < histogram_bins;
        __syncthreads();
        if (has_bin && of_mine[threadIdx.x] != 0) atomicAdd(of_all + threadIdx.x, of_mine[threadIdx.x]);
        __syncthreads();
        if (threadIdx.x == 0) meet();
        __syncthreads();
        return has_bin ? __ldcg(of_all + threadIdx.x) : 0;
    }
    __device__ static void stay() {}  // they are in global memory

    Index row, begin, count;

private:
    /// By the first warp.
    __device__ const Partial* exchange(const Partial& mine) const {
        Partial* const of_block = partials_ + meetings_ / static_cast<unsigned>(blocks_) % 2 * blocks_;
        if (threadIdx.x == 0) {
            __stcg(&of_block[rank()].first, mine.first);
            __stcg(&of_block[rank()].second, mine.second);
            meet();
        }
        __syncwarp();
        return of_block;
    }
    /// Waits until one thread of each block is here; what their blocks wrote before is visible then.
    __device__ void meet() const {
        __threadfence();
        atomicAdd(arrivals_, 1u);
        while (*static_cast<volatile unsigned*>(arrivals_) < meetings_) {
        }
        __threadfence();
    }
    Partial* partials_;
    unsigned *arrivals_, *histograms_;
    int blocks_;
    unsigned meetings_ = 0;  // times blocks
};

/// Launches a kernel (Meeting, RowPart, parameters…) for teams over `rows` rows of `length` Elements, which each block
/// may keep in dynamic shared memory. The kernel comes twice: for either kind of team.
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

    const auto start = [&](auto* kernel, const Meeting& meeting, const RowPart& part, int blocks, int threads,
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
        config.blockDim = dim3(static_cast<unsigned>(threads));
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
        const Index rows_at_once = std::min(rows, most_blocks / blocks);
        RowPart part{0, 0, length, divide_up(length, blocks), true};
        for (; part.first_row < rows; part.first_row += rows_at_once) {
            part.rows = std::min(rows_at_once, rows - part.first_row);
            start(cluster_kernel, Meeting{}, part, blocks, ClusterTeam::threads, cudaLaunchAttributeClusterDimension);
        }
        return;
    }

    constexpr Index most_of_team = 64;
    blocks = static_cast<int>(std::min({divide_up(length, 2 * per_block), most_of_team, Index{processors}}));
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
        start(grid_kernel, meeting, part, blocks, GridTeam::threads, cudaLaunchAttributeCooperative);
    }
}

}  // namespace colt5::cuda
