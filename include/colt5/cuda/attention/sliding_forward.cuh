// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include <cuda.h>

#include <colt5/cuda/attention/online_softmax.cuh>
#include <colt5/cuda/attention/single_rows.cuh>
#include <colt5/cuda/attention/sliding/mask.cuh>
#include <colt5/cuda/attention/sliding/producer.cuh>
#include <colt5/cuda/attention/sliding/segments.cuh>

/// Local attention in a kernel of compute capability 9.0a, for 16-bit heads of dimension 64 and a reach of at most 64.
/// forward.cuh has the kernel for everything else.
///
/// Tiles and segments are those of sliding_backward.cuh. Unlike there, a block needs no query tiles of its neighbours.
/// All keys of a query tile are at hand at once, so the softmax is not an online one.
///
/// The kernel is warp-specialized:
///
///     producer warps     copy tiles of q, k and v by TMA, each once; and what is masked
///     three warpgroups   take turns with the query tiles: q kᵀ by wgmma, softmax in registers, p v by wgmma
///
/// The order of all sums is fixed: it depends neither on the batch nor on the segments.
namespace colt5::cuda::sliding {

/// What a block of the kernel has in shared memory.
struct ForwardShared {
    static constexpr int consumers = 3;     // warpgroups
    static constexpr int key_stages = 7;    // three query tiles see five key tiles; two more are on their way
    static constexpr int query_stages = 6;  // a multiple of `consumers`: a stage always has the same warpgroup
    static constexpr int out_buffers = 2;   // while TMA stores one, the next one is written
    static constexpr int threads = (1 + consumers) * warpgroup, registers = 160;

    SwizzledTile k[key_stages], v[key_stages], q[query_stages], out[consumers][out_buffers];
    VisibleKeys visible[key_stages];
    float bias[bias_entries];
    alignas(16) std::byte row[consumers][warps][2 * dim];  // of attend_row
    hopper::Barrier keys_full[key_stages], keys_empty[key_stages];
    hopper::Barrier queries_full[query_stages], queries_empty[query_stages];
};
static_assert(sizeof(ForwardShared) <= most_shared_bytes);

struct ForwardMaps {
    CUtensorMap q, k, v, out;
};

/// The query tiles [first, end) of a block.
struct ForwardSegment {
    int first, end;

    template <typename T>
    __device__ ForwardSegment(const Attention<T>& a, int index, int tiles_each)
        : first(index * tiles_each), end(::min(first + tiles_each, (a.queries + tile_rows - 1) / tile_rows)) {}
    __device__ int tiles() const { return end - first; }
    /// The first row of key tile i of the block, whose query tile i sees its key tiles i, i + 1 and i + 2.
    __device__ int key_row(int first_query, int i) const { return first_query + (first + i - 1) * tile_rows; }
};

/// The producer of tiles; one thread.
__device__ inline void load_tiles(ForwardShared& shared, const ForwardMaps& maps, const ForwardSegment& segment,
                                  int first_query, int h, int b) {
    const auto load_keys = [&](int i) {
        const Ring<ForwardShared::key_stages> key{i};
        auto& full = shared.keys_full[key.stage];
        const int row = segment.key_row(first_query, i);
        shared.keys_empty[key.stage].wait(key.parity ^ 1);
        full.expect(2 * tile_bytes);
        hopper::tensor_load(&shared.k[key.stage], maps.k, 0, row, h, b, full);
        hopper::tensor_load(&shared.v[key.stage], maps.v, 0, row, h, b, full);
    };
    load_keys(0);
    load_keys(1);
    for (int i = 0; i < segment.tiles(); ++i) {
        const Ring<ForwardShared::query_stages> query{i};
        load_keys(i + 2);
        shared.queries_empty[query.stage].wait(query.parity ^ 1);
        shared.queries_full[query.stage].expect(tile_bytes);
        hopper::tensor_load(&shared.q[query.stage], maps.q, 0, (segment.first + i) * tile_rows, h, b,
                            shared.queries_full[query.stage]);
    }
}

/// One of the warpgroups that compute.
template <typename T, typename Bias>
struct ForwardWarpgroup {
    ForwardShared& shared;
    const Attention<T>& a;
    const HeadBias<T, Bias>& bias;
    const ForwardMaps& maps;
    const AttentionBlock<T>& block;
    const ForwardSegment& segment;
    float* log_sum_exp;  // of the block's head, or null
    int number;          // of the warpgroup
    TileThread at;

    __device__ void run() {
        // A wait by parity cannot tell a phase from the next but one. So a warpgroup waits for each phase of a barrier,
        // and the producer waits for all warpgroups, also at the first key tiles, which not all of them read.
        for (int i = 0; i < number; ++i) {
            shared.keys_full[i].wait(0);
            arrive(shared.keys_empty[i]);
        }
        for (int i = number; i < segment.tiles(); i += ForwardShared::consumers) attend(i);
        if (leads()) hopper::wait_for_reads_of_stores();
    }

private:
    using Keys = Ring<ForwardShared::key_stages>;
    static constexpr float infinity = std::numeric_limits<float>::infinity();

    /// Whether the thread is the one that starts stores.
    __device__ bool leads() const { return at.warp == 0 && at.lane == 0; }
    __device__ void sync() const { hopper::sync_some<warpgroup>(1 + number); }

    /// Query tile i of the block.
    __device__ void attend(int i) {
        const Keys key{i};
        const Ring<ForwardShared::query_stages> query{i};
        float p[neighbours][32], out[32];
        shared.queries_full[query.stage].wait(query.parity);
        multiply_keys(p, key, query.stage);
        arrive(shared.queries_empty[query.stage]);
        const float2 total = softmax(p, (segment.first + i) * tile_rows);
        multiply_values(out, p, key);
#pragma unroll
        for (int j = 0; j < neighbours; ++j) arrive(shared.keys_empty[(key + j).stage]);
        const float2 factor = {total.x > 0 ? reciprocal(total.x) : 0.0f, total.y > 0 ? reciprocal(total.y) : 0.0f};
#pragma unroll
        for (int e = 0; e < 32; ++e) out[e] *= of_row(factor, e);
        store(out, i);
    }
    /// Without a bias p = q kᵀ, with one scale / ln 2 · q kᵀ + bias / ln 2. Hidden pairs get −∞.
    __device__ void multiply_keys(float (&p)[neighbours][32], const Keys& key, int stage) {
#pragma unroll
        for (int j = 0; j < neighbours; ++j) shared.keys_full[(key + j).stage].wait((key + j).parity);
        hopper::fence_products();
#pragma unroll
        for (int j = 0; j < neighbours; ++j) {
#pragma unroll
            for (int k = 0; k < dim / 16; ++k)
                hopper::product_64<T, false, false>(p[j], shared.q[stage].columns(k),
                                                    shared.k[(key + j).stage].columns(k), k > 0);
            hopper::commit_products();
        }
        const Reach reach = Reach::of_query(a);
        const ThreadReach of_thread(reach, at);
        for_each_tile([&]<int j>() {
            constexpr int distance = (j - 1) * tile_rows;
            hopper::wait_products<neighbours - 1 - j>();
            hopper::expect_written(p[j]);
            if constexpr (has_bias<Bias>) {
                const float* const of_pairs = shared.bias + bias_center + at.pair - at.upper + distance;
                const float to_log2 = a.scale * static_cast<float>(log2_e);
#pragma unroll
                for (int e = 0; e < 32; ++e) p[j][e] = ::fmaf(p[j][e], to_log2, of_pairs[from_first(e)]);
            }
            // Keys that are hidden and not finite must not change the largest product.
            set_out_of_reach<distance>(p[j], -infinity, reach, of_thread);
            set_invisible(p[j], -infinity, shared.visible[(key + j).stage], at);
        });
    }
    /// p = exp of the logits minus the largest one of the row. Returns Σ p, and assigns log-sum-exps of the queries
    /// from `first` on.
    __device__ float2 softmax(float (&p)[neighbours][32], int first) const {
        const float scale = has_bias<Bias> ? 1.0f : a.scale * static_cast<float>(log2_e);
        float largest[4] = {-infinity, -infinity, -infinity, -infinity};  // which do not wait for each other
#pragma unroll
        for (int j = 0; j < neighbours; ++j)
#pragma unroll
            for (int e = 0; e < 32; ++e) largest[e % 4] = ::max(largest[e % 4], p[j][e]);
        const float2 top = {row_reduce(::max(largest[0], largest[1]), Greater()),
                            row_reduce(::max(largest[2], largest[3]), Greater())};
        const float2 shift = {top.x == -infinity ? 0.0f : top.x * scale, top.y == -infinity ? 0.0f : top.y * scale};
        float sums[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < neighbours; ++j)
#pragma unroll
            for (int e = 0; e < 32; ++e) {
                p[j][e] = fast_exp2(::fmaf(p[j][e], scale, -of_row(shift, e)));
                sums[e % 4] += p[j][e];
            }
        const float2 total = {row_reduce(sums[0] + sums[1], Plus()), row_reduce(sums[2] + sums[3], Plus())};
        if (log_sum_exp != nullptr && at.lane % 4 == 0) {
            const auto assign = [&](int row, float largest_of_row, float sum) {
                constexpr auto ln_2 = static_cast<float>(1 / log2_e);
                const float largest_logit = has_bias<Bias> ? largest_of_row * ln_2 : largest_of_row * a.scale;
                if (row < a.queries) log_sum_exp[row] = largest_logit + ::log(sum);
            };
            assign(first + at.upper, top.x, total.x);
            assign(first + at.upper + 8, top.y, total.y);
        }
        return total;
    }
    /// out = p v
    __device__ void multiply_values(float (&out)[32], const float (&p)[neighbours][32], const Keys& key) {
        std::uint32_t pairs[neighbours][16];
#pragma unroll
        for (int j = 0; j < neighbours; ++j)
#pragma unroll
            for (int e = 0; e < 16; ++e) pairs[j][e] = pack_pair<T>(p[j][2 * e], p[j][2 * e + 1]);
        hopper::fence_products();
#pragma unroll
        for (int j = 0; j < neighbours; ++j)
#pragma unroll
            for (int k = 0; k < tile_rows / 16; ++k)
                hopper::product<T, true>(out, pairs[j] + 4 * k, shared.v[(key + j).stage].rows(k), j + k > 0);
        hopper::commit_products();
        hopper::wait_products<0>();
        hopper::expect_written(out);
    }
    /// Stores query tile i by way of a buffer.
    __device__ void store(const float (&out)[32], int i) {
        auto& buffer = shared.out[number][i / ForwardShared::consumers % ForwardShared::out_buffers];
        const int first = (segment.first + i) * tile_rows;
        if (leads()) hopper::wait_for_reads_of_stores<ForwardShared::out_buffers - 1>();
        __syncwarp();
        sync();
        write_tile<T>(buffer, out, at);
        if (!is_finite(out)) attend_rows(buffer, out, first);
        hopper::fence_shared_stores();
        sync();
        if (leads()) {
            hopper::tensor_store(maps.out, &buffer, 0, first, block.h, block.b);
            hopper::commit_stores();
        }
        __syncwarp();
    }
    /// Computes the warp's rows that are NaN or infinite again, without the keys that the query does not see. See
    /// single_rows.cuh.
    __device__ void attend_rows(SwizzledTile& buffer, const float (&out)[32], int first) {
        float zero[2] = {0, 0};  // or NaN
#pragma unroll
        for (int e = 0; e < 32; ++e) zero[e % 4 / 2] = ::fmaf(out[e], 0.0f, zero[e % 4 / 2]);
        const unsigned upper = __ballot_sync(0xffffffffu, zero[0] != 0),
                       lower = __ballot_sync(0xffffffffu, zero[1] != 0);
        std::byte* const row = shared.row[number][at.warp];
        for (int r = 0; r < 16; ++r) {
            const int in_tile = 16 * at.warp + r, query = first + in_tile;
            if (((r < 8 ? upper : lower) >> 4 * (r % 8) & 0xfu) == 0 || query >= a.queries) continue;
            attend_row(reinterpret_cast<T*>(row), block.rows(a, a.q)[query], block.rows(a, a.k), block.rows(a, a.v),
                       MaskedKeyRange(a.first + query, Reach::of_query(a), a.keys, block.mask(a)),
                       static_cast<const float*>(nullptr), a.scale * static_cast<float>(log2_e), dim,
                       bias.of_query(query));
            __syncwarp();
            if (at.lane < 8)
                reinterpret_cast<uint4*>(buffer.bytes + 128 * in_tile)[at.lane ^ in_tile % 8] =
                    reinterpret_cast<const uint4*>(row)[at.lane];
            __syncwarp();
        }
    }
};

/// Assigns what `maps` have for out, and log_sum_exp (batch, heads, queries) unless it is null.
template <typename T, typename Bias>
__global__ void __launch_bounds__(hopper::launch_bound<ForwardShared::threads>, 1)
    attention_forward(const __grid_constant__ ForwardMaps maps, const Attention<T> a, const Bias bias,
                      float* log_sum_exp, int tiles_each) {
#if defined(COLT5_HOPPER)
    extern __shared__ __align__(1024) std::byte memory[];
    auto& shared = *reinterpret_cast<ForwardShared*>(memory);
    const AttentionBlock<T> block(a, 1);
    if (block.is_beyond(a)) return;
    const ForwardSegment segment(a, block.first, tiles_each);
    if (threadIdx.x == 0) {
        for (auto& barrier : shared.keys_full) barrier.init(2);
        for (auto& barrier : shared.queries_full) barrier.init(1);
        for (auto& barrier : shared.keys_empty) barrier.init(neighbours * warps);
        for (auto& barrier : shared.queries_empty) barrier.init(warps);
        hopper::fence_barrier_init();
    }
    load_bias(shared.bias, Reach::of_query(a), block.h, bias);
    __syncthreads();
    if (threadIdx.x < warpgroup) {
        hopper::lower_registers<24>();
        if (threadIdx.x == 0) load_tiles(shared, maps, segment, a.first, block.h, block.b);
        if (warp_id() == 1) {
            const bool* const mask = block.mask(a);
            for (int i = 0; i < segment.tiles() + neighbours - 1; ++i)
                mark_visible<ForwardShared::key_stages>(shared, i, segment.key_row(a.first, i), mask, a.keys);
        }
    } else {
        hopper::raise_registers<ForwardShared::registers>();
        const HeadBias<T, Bias> head_bias(a, block, bias);
        ForwardWarpgroup<T, Bias>{shared,
                                  a,
                                  head_bias,
                                  maps,
                                  block,
                                  segment,
                                  log_sum_exp != nullptr ? log_sum_exp + block.of_queries(a) : nullptr,
                                  static_cast<int>(threadIdx.x) / warpgroup - 1,
                                  TileThread()}
            .run();
    }
#endif
}

/// Assigns `out`, which has the layout of a.out, and log_sum_exp unless it is null, of a problem that `supports`
/// allows.
template <typename T, typename Bias>
void launch_attention_forward(const Cuda& policy, const Attention<T>& a, const Bias& bias, T* out, float* log_sum_exp) {
    const Index tiles = divide_up(a.queries, tile_rows);
    const Index tiles_each = tiles_of_segment(tiles, Index{a.batch} * a.heads(), multiprocessors(policy));
    const DeviceGuard guard(policy.device());  // of tensor_map
    const ForwardMaps maps{.q = map_of(a, a.q, a.queries),
                           .k = map_of(a, a.k, a.keys),
                           .v = map_of(a, a.v, a.keys),
                           .out = map_of(a, a.out.with(out), a.queries)};
    launch(policy, "attention_forward", attention_forward<T, Bias>, attention_grid(a, divide_up(tiles, tiles_each), 1),
           ForwardShared::threads, sizeof(ForwardShared), maps, a, bias, log_sum_exp, static_cast<int>(tiles_each));
}

}  // namespace colt5::cuda::sliding
