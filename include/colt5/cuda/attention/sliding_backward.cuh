// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <colt5/cuda/attention/sliding/bias_gradient.cuh>
#include <colt5/cuda/attention/sliding/gradient.cuh>
#include <colt5/cuda/attention/sliding/nan_rows.cuh>
#include <colt5/cuda/attention/sliding/producer.cuh>
#include <colt5/cuda/attention/sliding/segments.cuh>
#include <colt5/cuda/attention/sliding/softmax.cuh>

/// The vector-Jacobian product of local attention in one kernel of compute capability 9.0a, for 16-bit heads of
/// dimension 64 and a reach of at most 64. backward.cuh has the kernels for everything else.
///
/// Query tile t and key tile t have 64 rows each, at the same tokens. So the queries of tile t see keys of the tiles
/// t − 1, t and t + 1 alone. A block owns consecutive tiles of one head, its segment. It walks along them, one query
/// tile in each step, and begins and ends one tile outside, whose queries see its keys, too. With the three key tiles
/// of a query tile, a step computes
///
///     p = exp(scale · q kᵀ + bias − log_sum_exp),   dp = d_out vᵀ,   D = Σ p dp,   ds = p (dp − D)
///     d_q = scale · ds k,                    d_k += scale · dsᵀ q,          d_v += pᵀ d_out
///
/// The kernel is warp-specialized. All products are wgmma of tiles of 64 × 64 numbers.
///
///     producer warps      copy tiles of q, k, v and d_out by TMA, each once; and what is masked, and log-sum-exps
///     softmax warpgroup   computes p and ds, and writes them to shared memory in 16 bits
///     gradient warpgroup  accumulates d_k and d_v of three key tiles in registers, the first of which the step
///                         completes; and computes d_q
///     two more warps      sum ds by distance, if there is a bias
///
/// The order of all sums is fixed. That of the gradients of q, k and v depends neither on the batch nor on the
/// segments.
namespace colt5::cuda::sliding {

inline constexpr int backward_threads = 3 * warpgroup;

/// Assigns what `maps` have for d_q, d_k and d_v, and D of all queries.
template <typename T, typename Bias>
__global__ void __launch_bounds__(hopper::launch_bound<backward_threads>, 1)
    attention_backward(const __grid_constant__ Maps maps, const Attention<T> a, const Bias bias,
                       const AttentionGradients<T> d, float* dots, const NanGroups nan_groups, int tiles_each) {
#if defined(COLT5_HOPPER)
    extern __shared__ __align__(1024) std::byte memory[];
    auto& shared = *reinterpret_cast<Shared*>(memory);
    const AttentionBlock<T> block(a, 1);
    if (block.is_beyond(a)) return;
    const Segment segment(a, block.first, tiles_each);
    if (threadIdx.x == 0) {
        for (auto& barrier : shared.keys_full) barrier.init(2);
        for (auto& barrier : shared.values_full) barrier.init(1);
        for (auto& barrier : shared.queries_full) barrier.init(1 + warp_size);
        for (auto& barrier : shared.keys_empty) barrier.init(2 * warps);
        for (auto& barrier : shared.values_empty) barrier.init(warps);
        for (auto& barrier : shared.queries_empty) barrier.init(warps + 1);
        for (auto& barrier : shared.weights_full) barrier.init(warps);
        for (auto& barrier : shared.weights_empty) barrier.init(warps + (has_bias<Bias> ? BiasGradientWarp::warps : 0));
        hopper::fence_barrier_init();
    }
    load_bias(shared.bias, Reach::of_query(a), block.h, bias);
    __syncthreads();
    if (threadIdx.x < warpgroup) {
        hopper::lower_registers<24>();
        if (threadIdx.x == 0) produce_tiles(shared, maps, segment, a.first, block.h, block.b);
        if (warp_id() == 1) produce_numbers(shared, a, d.log_sum_exp, block, segment);
        if constexpr (has_bias<Bias>)
            if (warp_id() >= 2) sum_bias_gradient(shared, a, block, segment, bias, warp_id() - 2);
    } else if (threadIdx.x < 2 * warpgroup) {
        hopper::raise_registers<240>();
        softmax_warpgroup<has_bias<Bias>>(shared, a, dots + block.of_queries(a), block, segment);
    } else {
        hopper::raise_registers<240>();
        GradientWarpgroup<T>{shared, a, d, maps, nan_groups, block, segment, TileThread()}.walk();
    }
#endif
}

/// Assigns d.d_q, d.d_k and d.d_v of a problem that `supports` allows, with a.first at most tile_rows, and adds to
/// d_table, of those buckets, if there is a bias; does not read d.out.
template <typename T, typename Bias, typename DTable>
void launch_attention_backward(const Cuda& policy, const Attention<T>& a, const Bias& bias,
                               const AttentionGradients<T>& d, const DTable& d_table,
                               const RelativePositionBuckets& buckets) {
    const Index heads = Index{a.batch} * a.heads(), queries = heads * a.queries;
    const Index query_groups = heads * divide_up(a.queries, 16);
    const Index key_groups = heads * divide_up(a.keys + tile_rows, 16);
    VectorTensor<float, Cuda> dots(policy, {queries});
    VectorTensor<int, Cuda> lists(policy, {2 + query_groups + key_groups});
    auto* const counts = reinterpret_cast<unsigned*>(lists.data());
    const NanGroups nan_groups{{counts, lists.data() + 2}, {counts + 1, lists.data() + 2 + query_groups}};
    const DeviceGuard guard(policy.device());  // of tensor_map, too
    check(cudaMemsetAsync(counts, 0, 2 * sizeof(unsigned), policy.stream()), "cudaMemsetAsync");
    const Maps maps{.q = map_of(a, a.q, a.queries),
                    .k = map_of(a, a.k, a.keys),
                    .v = map_of(a, a.v, a.keys),
                    .d_out = map_of(a, a.out.with(d.d_out), a.queries),
                    .d_q = map_of(a, d.d_q, a.queries),
                    .d_k = map_of(a, d.d_k, a.keys),
                    .d_v = map_of(a, d.d_v, a.keys)};
    const Index processors = multiprocessors(policy), tiles = divide_up(a.queries, tile_rows);
    const Index tiles_each = tiles_of_segment(tiles, heads, processors);
    const Index segments = divide_up(tiles, tiles_each);
    with_bias_parts<BiasGradientWarp>(policy, a, segments, bias, d_table, buckets, [&](const Bias& with_parts) {
        launch(policy, "attention_backward", attention_backward<T, Bias>, attention_grid(a, segments, 1),
               backward_threads, sizeof(Shared), maps, a, with_parts, d, dots.data(), nan_groups,
               static_cast<int>(tiles_each));
    });
    launch(policy, "recompute_queries", recompute_queries<T, Bias>, grid(std::min(query_groups, processors)), warpgroup,
           0, nan_groups.queries, a, bias, d, dots.data());
    launch(policy, "recompute_keys", recompute_keys<T, Bias>, grid(std::min(key_groups, processors)), warpgroup, 0,
           nan_groups.keys, a, bias, d, dots.data());
}

}  // namespace colt5::cuda::sliding
