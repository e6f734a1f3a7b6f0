// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>

#include <colt5/cuda/cluster_team.cuh>
#include <colt5/cuda/grid_team.cuh>
#include <colt5/cuda/zero.cuh>

/// A team is one or more blocks that process one row together. Each block has a chunk of the row; they exchange sums.
///
/// A team is a cluster if the row fits into its shared memory (ClusterTeam), and otherwise some blocks of a cooperative
/// launch, which exchange through global memory (GridTeam). How a row is cut depends on its length, its type, the
/// kernel and the device, but not on the number of rows; and so do the bits of all sums.
namespace colt5::cuda {

/// Launches a kernel with the parameters (TeamBarrier, RowPart, parameters…) for `rows` rows of `length` Elements, one
/// team for each row. A block may keep its chunk in dynamic shared memory. The caller gives two instantiations of the
/// kernel: one for ClusterTeam and one for GridTeam.
template <typename Element, typename... Parameters, typename... Arguments>
void launch_teams(const Cuda& policy, const char* name, void (*cluster_kernel)(TeamBarrier, RowPart, Parameters...),
                  void (*grid_kernel)(TeamBarrier, RowPart, Parameters...), Index rows, Index length,
                  const Arguments&... arguments) {
    if (rows == 0 || length == 0) return;
    const DeviceGuard guard(policy.device());
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, cluster_kernel), name);
    int shared_limit = 0;
    const int processors = multiprocessors(policy);
    check(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, policy.device()), name);
    shared_limit -= static_cast<int>(attributes.sharedSizeBytes);

    const auto start = [&](auto* kernel, const TeamBarrier& barrier, const RowPart& part, int blocks, int threads,
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
        check(cudaLaunchKernelEx(&config, kernel, barrier, part, static_cast<Parameters>(arguments)...), name);
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
            start(cluster_kernel, TeamBarrier{}, part, blocks, ClusterTeam::threads,
                  cudaLaunchAttributeClusterDimension);
        }
        return;
    }

    constexpr Index most_of_team = 64;
    blocks = static_cast<int>(std::min({divide_up(length, 2 * per_block), most_of_team, Index{processors}}));
    RowPart part{0, 0, length, divide_up(length, blocks), bytes(blocks) <= shared_limit};
    const Index rows_at_once = std::min<Index>(rows, processors / blocks);
    MatrixTensor<Partial, Cuda> partials(policy, {rows_at_once, 2 * blocks});
    VectorTensor<unsigned, Cuda> counters(policy, {rows_at_once * (1 + most_histograms * histogram_bins)});
    const TeamBarrier barrier{partials.data(), counters.data() + rows_at_once * most_histograms * histogram_bins,
                              counters.data(), blocks};
    for (; part.first_row < rows; part.first_row += rows_at_once) {
        part.rows = std::min(rows_at_once, rows - part.first_row);
        zero_kernel(policy, counters.view());
        start(grid_kernel, barrier, part, blocks, GridTeam::threads, cudaLaunchAttributeCooperative);
    }
}

}  // namespace colt5::cuda
