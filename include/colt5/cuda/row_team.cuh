// SPDX-License-Identifier: MIT
#pragma once

#include <cooperative_groups.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <colt5/cuda/kernel.cuh>
#include <colt5/cuda/ptx.cuh>
#include <colt5/cuda/zero.cuh>

/// A team is one or more blocks that process one row together. Each block has a chunk of the row; they exchange sums.
///
/// A team is a cluster if the row fits into its shared memory (ClusterTeam), and otherwise some blocks of a cooperative
/// launch, which exchange through global memory (GridTeam). How a row is cut depends on its length, its type, the
/// kernel and the device, but not on the number of rows; and so do the bits of all sums.
namespace colt5::cuda {

inline constexpr int histogram_bins = 256;  // not more than a block has threads
/// The most histograms that a kernel merges: top_k's, one for each digit of its keys. The longest keys are a logit of
/// 64 bits and an index of 31 bits: 12 digits of 8 bits.
inline constexpr int max_histograms = 12;
inline constexpr int max_cluster_blocks = 8, grid_team_threads = 1024;

/// A block's contribution to a reduction over its row: a value and a count.
struct alignas(16) Partial {
    double value, count;
};

/// The rows of one launch, and how each is cut into chunks, one for each block of its team.
struct RowSplit {
    Index first_row, rows;  // of the launch
    Index length, chunk;    // entries of a row, and of a chunk
    bool on_chip;           ///< a block keeps its chunk in shared memory
};

/// Global memory for the barriers and exchanges of GridTeam: those of one launch, one barrier for each row. `arrivals`
/// and `histograms` are zeros at the start. ClusterTeam does not read it.
struct TeamBarrier {
    Partial* partials;     // (rows, 2, blocks)
    unsigned* arrivals;    // (rows)
    unsigned* histograms;  // (rows, max_histograms, bins)
    int blocks;            // of a team
};

/// The identity, for reductions that nothing follows.
struct Identity {
    __device__ Partial operator()(const Partial& partial) const { return partial; }
};

/// Reduces a value of each thread of a block by `with`, and sums a count of each. The first warp computes
/// across(partial of the block), and every thread gets its result. The order is fixed, so that the bits are the same
/// every time.
template <int threads, typename T, typename Combine, typename Across>
__device__ auto combine_in_block(T value, unsigned thread_count, Combine&& with, Across&& across) {
    constexpr int warps = threads / warp_size;  // a power of two
    using Result = decltype(across(Partial{}));
    __shared__ T warp_values[warps];
    __shared__ unsigned warp_counts[warps];
    __shared__ Result result;
    const int warp = static_cast<int>(threadIdx.x) / warp_size, lane = lane_id();
    value = warp_reduce(value, with);
    thread_count = __reduce_add_sync(0xffffffffu, thread_count);
    if (lane == 0) {
        warp_values[warp] = value;
        warp_counts[warp] = thread_count;
    }
    __syncthreads();
    if (warp == 0) {
        value = warp_values[lane % warps];
        for (int offset = warps / 2; offset > 0; offset /= 2)
            value = with(value, __shfl_xor_sync(0xffffffffu, value, offset));
        thread_count = __reduce_add_sync(0xffffffffu, lane < warps ? warp_counts[lane] : 0);
        const Result total = across(Partial{static_cast<double>(value), static_cast<double>(thread_count)});
        if (lane == 0) result = total;
    }
    __syncthreads();
    return result;
}

/// The blocks of a cluster, which write to each other's shared memory; a single block on devices without clusters. All
/// threads of all blocks of a team make the same calls.
class ClusterTeam {
public:
    static constexpr int threads = 512;  // of a block; more threads take longer at each barrier

    __device__ ClusterTeam(const TeamBarrier&, const RowSplit& split) {
        row = split.first_row + blockIdx.x / blocks();
        begin = rank() * split.chunk;
        count = ::max(Index{0}, ::min(split.length - begin, split.chunk));
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

    /// Reduces `value` over all threads of the team by `with`, sums `thread_count`, and returns then({both results}) to
    /// every thread. The third argument is the identity element of `with`, which only GridTeam needs.
    template <typename T, typename Combine, typename Then = Identity>
    __device__ auto combine(T value, unsigned thread_count, double, Combine&& with, Then&& then = {}) {
        const int exchange_index = exchanges_++;
        return combine_in_block<threads>(value, thread_count, with, [&](const Partial& mine) {
            const Partial* const block_partials = exchange(mine, exchange_index);
            Partial total = block_partials[0];
            for (int i = 1; i < blocks(); ++i)
                total = {with(total.value, block_partials[i].value), total.count + block_partials[i].count};
            return then(total);
        });
    }

    /// Σ of the counts of the blocks of lower rank.
    __device__ Index sum_before(unsigned thread_count) {
        const int exchange_index = exchanges_++;
        const auto before = combine_in_block<threads>(0.0f, thread_count, Plus(), [&](const Partial& mine) {
            const Partial* const block_partials = exchange(mine, exchange_index);
            Partial total{0, 0};
            for (int i = 0; i < rank(); ++i) total.count += block_partials[i].count;
            return total;
        });
        return static_cast<Index>(before.count);
    }

    /// Sums the histograms of all blocks. Each thread gets the count of its bin, or 0 if it has none. Other blocks may
    /// read `histogram` until the next merge returns: do not change it before, and call `wait_for_readers` before the
    /// kernel ends. The second argument is the number of the digit, which only GridTeam needs.
    __device__ unsigned merge_histogram(unsigned* histogram, int) {
        sync();
        unsigned sum = 0;
#if __CUDA_ARCH__ >= 900
        if (threadIdx.x < histogram_bins)
#pragma unroll
            for (int i = 0; i < max_cluster_blocks; ++i)
                if (i < blocks()) sum += cooperative_groups::this_cluster().map_shared_rank(histogram, i)[threadIdx.x];
#else
        if (threadIdx.x < histogram_bins) sum = histogram[threadIdx.x];
#endif
        return sum;
    }
    /// Waits until no other block reads this one's histograms any more.
    __device__ static void wait_for_readers() {
        if (blocks() > 1) sync();
    }

    Index row, begin, count;

private:
    /// The partials that the blocks send to this one. Exchanges use two sets alternately, since one block may be an
    /// exchange ahead of another.
    struct Inbox {
        Partial partials[2][max_cluster_blocks];
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
                    "r"(full), "r"(lane), "d"(mine.value), "d"(mine.count)
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

/// Launches a kernel with the parameters (TeamBarrier, RowSplit, parameters…) for `rows` rows of `length` Elements, one
/// team for each row. A block may keep its chunk in dynamic shared memory. The caller gives two instantiations of the
/// kernel: one for ClusterTeam and one for GridTeam.
template <typename Element, typename... Parameters, typename... Arguments>
void launch_teams(const Cuda& policy, const char* name, void (*cluster_kernel)(TeamBarrier, RowSplit, Parameters...),
                  void (*grid_kernel)(TeamBarrier, RowSplit, Parameters...), Index rows, Index length,
                  const Arguments&... arguments) {
    if (rows == 0 || length == 0) return;
    const DeviceGuard guard(policy.device());
    cudaFuncAttributes attributes{}, grid_attributes{};
    check(cudaFuncGetAttributes(&attributes, cluster_kernel), name);
    check(cudaFuncGetAttributes(&grid_attributes, grid_kernel), name);
    int shared_limit = 0;
    const int processors = multiprocessors(policy);
    check(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, policy.device()), name);
    shared_limit -= static_cast<int>(std::max(attributes.sharedSizeBytes, grid_attributes.sharedSizeBytes));

    const auto start = [&](auto* kernel, const TeamBarrier& barrier, const RowSplit& split, int blocks, int threads,
                           cudaLaunchAttributeID how) {
        const std::size_t shared = split.on_chip ? static_cast<std::size_t>(split.chunk) * sizeof(Element) : 0;
        const std::lock_guard lock(shared_bytes_mutex());
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
        config.gridDim = grid(split.rows * blocks);
        config.blockDim = dim3(static_cast<unsigned>(threads));
        config.dynamicSmemBytes = shared;
        config.stream = policy.stream();
        config.attrs = &attribute;
        config.numAttrs = blocks > 1 ? 1 : 0;
        check(cudaLaunchKernelEx(&config, kernel, barrier, split, static_cast<Parameters>(arguments)...), name);
    };

    constexpr Index per_block = 4096;
    const auto bytes = [&](int blocks) { return divide_up(length, blocks) * static_cast<Index>(sizeof(Element)); };
    const int max_in_cluster = attributes.ptxVersion >= 90 ? max_cluster_blocks : 1;
    int blocks = 1;
    while (blocks < max_in_cluster && (length > blocks * per_block || bytes(blocks) > shared_limit)) blocks *= 2;
    if (bytes(blocks) <= shared_limit) {
        const Index rows_at_once = std::min(rows, max_blocks / blocks);
        RowSplit split{0, 0, length, divide_up(length, blocks), true};
        for (; split.first_row < rows; split.first_row += rows_at_once) {
            split.rows = std::min(rows_at_once, rows - split.first_row);
            start(cluster_kernel, TeamBarrier{}, split, blocks, ClusterTeam::threads,
                  cudaLaunchAttributeClusterDimension);
        }
        return;
    }

    constexpr Index max_team_blocks = 64;
    blocks = static_cast<int>(std::min({divide_up(length, 2 * per_block), max_team_blocks, Index{processors}}));
    RowSplit split{0, 0, length, divide_up(length, blocks), bytes(blocks) <= shared_limit};
    const Index rows_at_once = std::min<Index>(rows, processors / blocks);
    MatrixTensor<Partial, Cuda> partials(policy, {rows_at_once, 2 * blocks});
    VectorTensor<unsigned, Cuda> counters(policy, {rows_at_once * (1 + max_histograms * histogram_bins)});
    const TeamBarrier barrier{partials.data(), counters.data() + rows_at_once * max_histograms * histogram_bins,
                              counters.data(), blocks};
    for (; split.first_row < rows; split.first_row += rows_at_once) {
        split.rows = std::min(rows_at_once, rows - split.first_row);
        zero_kernel(policy, counters.view());
        start(grid_kernel, barrier, split, blocks, grid_team_threads, cudaLaunchAttributeCooperative);
    }
}

}  // namespace colt5::cuda
