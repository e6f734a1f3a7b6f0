// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention/sliding/block.cuh>
#include <colt5/cuda/attention/sliding/nan_rows.cuh>
#include <colt5/cuda/attention/sliding/producer.cuh>

/// The gradient warpgroup of sliding_backward.cuh.
namespace colt5::cuda::sliding {

template <typename T>
struct GradientWarpgroup {
    Shared& shared;
    const Attention<T>& a;
    const AttentionGradients<T>& d;
    const Maps& maps;
    const NanGroups& nan_groups;
    const AttentionBlock<T>& block;
    const Segment& segment;
    const TileThread at;
    float d_k[neighbours][32], d_v[neighbours][32];  // of key tile t in number t − first_step + 1, modulo 3

    __device__ void walk() {
        for (int i = 0; i < neighbours - 1; ++i) shared.keys_full[i].wait(0);
        // The accumulators are in registers, so their numbers must be constants.
        for (int i = 0; i < segment.steps; i += neighbours) {
            step<0>(i);
            if (i + 1 < segment.steps) step<1>(i + 1);
            if (i + 2 < segment.steps) step<2>(i + 2);
        }
        // No further query tile completes the last segment's last key tile and the one beyond the queries, if there is
        // one: they are stored here.
        if (segment.end_key >= segment.first_step + segment.steps) {
            if (segment.steps % neighbours == 1)
                store_last<0>();
            else if (segment.steps % neighbours == 2)
                store_last<1>();
            else
                store_last<2>();
        }
        if (leads()) hopper::wait_for_reads_of_stores();
    }

private:
    /// Whether the thread is the one that starts stores.
    __device__ bool leads() const { return at.warp == 0 && at.lane == 0; }
    __device__ static void sync() { hopper::sync_some<warpgroup>(1); }

    /// The i-th query tile, with i % 3 = phase.
    template <int phase>
    __device__ void step(int i) {
        const Ring<key_stages> key{i}, last_key = key + 2;
        const Ring<query_stages> query{i};
        const Ring<weight_buffers> weights{i};
        const int tile = segment.first_step + i;
        const bool is_own = tile >= segment.first && tile < segment.end;
        shared.keys_full[last_key.stage].wait(last_key.parity);
        shared.queries_full[query.stage].wait(query.parity);
        shared.weights_full[weights.stage].wait(weights.parity);
        hopper::fence_products();
#pragma unroll
        for (int j = 0; j < neighbours; ++j)
#pragma unroll
            for (int k = 0; k < tile_rows / 16; ++k) {
                const bool adds = k > 0 || (j < neighbours - 1 && i > 0);
                hopper::product_64<T, true, true>(d_v[(phase + j) % neighbours], shared.p[weights.stage][j].rows(k),
                                                  shared.d_out[query.stage].rows(k), adds);
                hopper::product_64<T, true, true>(d_k[(phase + j) % neighbours], shared.ds[weights.stage][j].rows(k),
                                                  shared.q[query.stage].rows(k), adds);
            }
        hopper::commit_products();
        release_queries(i - 1);
        hopper::wait_products<0>();
#pragma unroll
        for (int j = 0; j < neighbours; ++j) {
            hopper::expect_written(d_k[j]);
            hopper::expect_written(d_v[j]);
        }
        store<phase>(tile - 1, query.stage);

        if (is_own) {
            auto& d_q = d_k[phase];  // which has been stored, or is another block's
            hopper::fence_products();
#pragma unroll
            for (int j = 0; j < neighbours; ++j)
#pragma unroll
                for (int k = 0; k < tile_rows / 16; ++k)
                    hopper::product_64<T, false, true>(d_q, shared.ds[weights.stage][j].columns(k),
                                                       shared.k[(key + j).stage].rows(k), j + k > 0);
            hopper::commit_products();
            hopper::wait_products<0>();
            hopper::expect_written(d_q);
            write_tile<T>(shared.d_q, d_q, at, a.scale);
            if (!is_finite(d_q)) report(nan_groups.queries, tile * tile_rows, 0, a.queries);
            hopper::fence_shared_stores();
            sync();
            if (leads()) {
                hopper::tensor_store(maps.d_q, &shared.d_q, 0, tile * tile_rows, block.h, block.b);
                hopper::commit_stores();
            }
            __syncwarp();
        }
        arrive(shared.weights_empty[weights.stage]);
        arrive(shared.keys_empty[key.stage]);
    }
    /// Frees the stage of the query tile before, if there is one, after all products and stores that read it.
    __device__ void release_queries(int i) {
        sync();
        if (i >= 0 && leads()) {
            hopper::wait_for_reads_of_stores();
            shared.queries_empty[i % query_stages].arrive();
        }
        __syncwarp();
    }
    template <int phase>
    __device__ void store_last() {
        const int i = segment.steps - 1, tile = segment.first_step + i, stage = i % query_stages;
        if (leads()) hopper::wait_for_reads_of_stores();
        __syncwarp();
        store<(phase + 1) % neighbours>(tile, stage);
        if (leads()) hopper::wait_for_reads_of_stores();
        __syncwarp();
        store<(phase + 2) % neighbours>(tile + 1, stage);
    }
    /// Stores accumulators `number`, of a complete key tile, if it is the block's, by way of the stage of a query tile
    /// that no product reads any more.
    template <int number>
    __device__ void store(int tile, int stage) {
        if (tile < segment.first_key || tile >= segment.end_key) return;
        const int first = a.first + tile * tile_rows;
        sync();
        const TileThread at;
        write_tile<T>(shared.q[stage], d_k[number], at, a.scale);
        write_tile<T>(shared.d_out[stage], d_v[number], at);
        const bool finite_k = is_finite(d_k[number]), finite_v = is_finite(d_v[number]);
        if (!finite_k || !finite_v) report(nan_groups.keys, first, first_key(a), a.keys);
        hopper::fence_shared_stores();
        sync();
        if (first < 0) {  // TMA stores no box whose first row is negative
            copy_rows(block.rows(a, d.d_k), shared.q[stage], first);
            copy_rows(block.rows(a, d.d_v), shared.d_out[stage], first);
        } else if (leads()) {
            hopper::tensor_store(maps.d_k, &shared.q[stage], 0, first, block.h, block.b);
            hopper::tensor_store(maps.d_v, &shared.d_out[stage], 0, first, block.h, block.b);
            hopper::commit_stores();
        }
        __syncwarp();
    }
    /// Copies the rows of a tile that exist; `first` is the number of its first row.
    __device__ void copy_rows(const Rows<T>& to, const SwizzledTile& tile, int first) const {
#pragma unroll 1
        for (int i = rarely_needed(static_cast<int>(threadIdx.x) % warpgroup); i < tile_rows * 8; i += warpgroup) {
            const int row = i / 8, unit = i % 8;
            if (first + row >= 0 && first + row < a.keys)
                *reinterpret_cast<uint4*>(to[first + row] + 8 * unit) =
                    *reinterpret_cast<const uint4*>(tile.bytes + row * 128 + ((unit ^ (row % 8)) << 4));
        }
    }
    /// The warp's 16 rows of the tile whose first row is `first`; the head has the rows from `begin` to `end`.
    __device__ void report(const GroupList& list, int first, int begin, int end) const {
        const int group = (first - begin) / 16 + at.warp, groups = (end - begin + 15) / 16;
        if (at.lane == 0 && group < groups) list.add((block.b * a.heads() + block.h) * groups + group);
    }
};

}  // namespace colt5::cuda::sliding
