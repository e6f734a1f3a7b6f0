// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <limits>

#include <cuda.h>

#include <colt5/cuda/attention/gradients.cuh>
#include <colt5/cuda/attention/sliding/block.cuh>

/// The producer warps of sliding_backward.cuh, and marks of hidden keys for sliding_forward.cuh, too.
namespace colt5::cuda::sliding {

/// The tensor maps of operands and results.
struct Maps {
    CUtensorMap q, k, v, d_out, d_q, d_k, d_v;
};

/// The producer of tiles; one thread.
__device__ inline void produce_tiles(Shared& shared, const Maps& maps, const Segment& segment, int first, int h,
                                     int b) {
    const auto load = [&](void* to, const CUtensorMap& map, int row, hopper::Barrier& full, hopper::Barrier& empty,
                          unsigned parity) {
        empty.wait(parity ^ 1);
        full.expect(tile_bytes);
        hopper::tensor_load(to, map, 0, row, h, b, full);
    };
    const auto load_keys = [&](int i) {
        const Ring<key_stages> key{i};
        const Ring<value_stages> value{i};
        const int row = first + (segment.first_step - 1 + i) * tile_rows;
        load(&shared.k[key.stage], maps.k, row, shared.keys_full[key.stage], shared.keys_empty[key.stage], key.parity);
        load(&shared.v[value.stage], maps.v, row, shared.values_full[value.stage], shared.values_empty[value.stage],
             value.parity);
    };
    load_keys(0);
    load_keys(1);
    for (int i = 0; i < segment.steps; ++i) {
        const Ring<query_stages> query{i};
        const int tile = segment.first_step + i;
        load_keys(i + 2);
        auto& full = shared.queries_full[query.stage];
        shared.queries_empty[query.stage].wait(query.parity ^ 1);
        full.expect(2 * tile_bytes);
        hopper::tensor_load(&shared.q[query.stage], maps.q, 0, tile * tile_rows, h, b, full);
        hopper::tensor_load(&shared.d_out[query.stage], maps.d_out, 0, tile * tile_rows, h, b, full);
    }
}

/// Sets shared.visible of key tile i of the block, which begins at `row`. The mask is null or has `keys` entries. A
/// warp calls it, in the order of tiles.
template <int key_stages, typename Shared>
__device__ void mark_visible(Shared& shared, int i, int row, const bool* mask, int keys) {
    const Ring<key_stages> key{i};
    const int lane = lane_id();
    const auto is_visible = [&](int at) { return at >= 0 && at < keys && (mask == nullptr || mask[at]); };
    const VisibleKeys visible{{__ballot_sync(0xffffffffu, is_visible(row + lane)),
                               __ballot_sync(0xffffffffu, is_visible(row + warp_size + lane))}};
    shared.keys_empty[key.stage].wait(key.parity ^ 1);
    __syncwarp();
    if (lane == 0) {
        shared.visible[key.stage] = visible;
        shared.keys_full[key.stage].arrive();
    }
}

/// The producer of shared.visible, with the keys, and of shared.shift, with the queries; one warp.
template <typename T>
__device__ void produce_numbers(Shared& shared, const Attention<T>& a, const float* log_sum_exp,
                                const AttentionBlock<T>& block, const Segment& segment) {
    const bool* const mask = block.mask(a);
    const int lane = lane_id();
    const auto load_keys = [&](int i) {
        mark_visible<key_stages>(shared, i, a.first + (segment.first_step - 1 + i) * tile_rows, mask, a.keys);
    };
    log_sum_exp += block.of_queries(a);
    load_keys(0);
    load_keys(1);
    for (int i = 0; i < segment.steps; ++i) {
        const Ring<query_stages> query{i};
        const auto shift = [&](int row) {
            const int at = (segment.first_step + i) * tile_rows + row;
            return shift_of(at < a.queries ? log_sum_exp[at] : -std::numeric_limits<float>::infinity());
        };
        const float low = shift(lane), high = shift(warp_size + lane);
        load_keys(i + 2);
        shared.queries_empty[query.stage].wait(query.parity ^ 1);
        shared.shift[query.stage][lane] = low;
        shared.shift[query.stage][warp_size + lane] = high;
        shared.queries_full[query.stage].arrive();  // each lane for itself, as racecheck wants it
    }
}

}  // namespace colt5::cuda::sliding
