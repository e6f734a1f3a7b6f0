// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda.h>

#include <colt5/cuda/kernel.cuh>
#include <colt5/cuda/ptx.cuh>
#include <colt5/op/rms_norm.hpp>

namespace colt5::cuda {
template <typename T>
struct Gelu;  // cuda/feed_forward.cuh
}

/// Both products of the light feedforward in one kernel of compute capability 9.0a, for a model dimension of 512 and a
/// hidden layer of 256, which stays in registers. Its values before GELU are also written out if backward wants them.
/// Other kernels lay out the weights before it, and recompute rows that overflow after it.
///
/// RMSNorm multiplies row i by s_i = √d / ‖x_i‖, which can be applied after the product, and columns by gamma, which
/// can be multiplied into the weight before it:
///
///     norm(x) · hidden_weightᵀ = s ∘ (x · (hidden_weight ∘ gamma)ᵀ)
///
/// So x enters the first product unchanged. The norms are summed at the same time, and s scales the accumulators.
///
/// The kernel is warp-specialized. A producer thread copies x and the weights by TMA into a ring of stages. Two
/// consumer warpgroups multiply by wgmma, each computes 64 of a tile's 128 rows. The pipeline's steps for one tile are
/// `panels` panels of x with hidden_weight, and then `column_blocks` blocks of 64 columns of y with project_weight.
namespace colt5::cuda::fused {

inline constexpr int dim = 512, hidden = 256, tile_rows = 128, panel_columns = 64, panels = dim / panel_columns;
inline constexpr int warpgroup = 128, consumers = 2, threads = (1 + consumers) * warpgroup, stages = 4;
inline constexpr int panel_bytes = tile_rows * panel_columns * 2;  // 64 columns of a tile of x
inline constexpr int weight_bytes = hidden * panel_columns * 2;    // of a stage
inline constexpr int column_blocks = dim / 64;                     // of y, 64 columns each
inline constexpr int steps = panels + column_blocks;               // of the pipeline for a tile
inline constexpr int warp_rows = 16, epilogue_columns = 32;

/// The kernel's shared memory.
struct Shared {
    struct alignas(1024) Stage {
        std::byte weights[weight_bytes], x[panel_bytes];
    };
    Stage stage[stages];
    float epilogue[consumers * 4][warp_rows][epilogue_columns + 8];  // each warp's; padded against bank conflicts
    std::uint32_t hidden_bias[hidden / 2], project_bias[dim / 2];
    hopper::Barrier full[stages], empty[stages];
};
inline constexpr int shared_bytes = static_cast<int>(sizeof(Shared)) + 1024;  // for the alignment of Shared

/// A list, in global memory, of the rows that recompute_rows computes: those that are not finite or whose squares
/// overflow.
struct RowList {
    unsigned* count;
    int* rows;  // as many as there are tokens
};

/// The offset of 16-byte unit `unit` of a row in a panel, swizzled as TMA does it.
__device__ inline int swizzled(int row, int unit) {
    return row * 128 + ((unit ^ (row & 7)) << 4);
}

/// Where a thread is in the ring of stages: the next stage, and how often it has gone round. The parity of `round` is
/// that to wait for on `full`; `empty` is one round behind.
struct PipelineState {
    int stage = 0;
    unsigned round = 0;
    __device__ void next() {
        if (++stage == stages) {
            stage = 0;
            ++round;
        }
    }
};

/// Lays the weights out in the order of the pipeline. Steps 0 to 7: 64 columns each of hidden_weight ∘ gamma. Steps 8
/// to 15: 64 rows each of project_weight, as four panels of 64 columns. Also empties the list of rows to recompute.
template <typename T>
__global__ void lay_out_weights(T* stage, RowList to_recompute, const T* hidden_weight, const T* gamma,
                                const T* project_weight) {
    constexpr int units = hidden * dim / 8;  // of 16 bytes, in each weight
    const int unit = static_cast<int>(global_thread());
    if (unit == 0) *to_recompute.count = 0;
    auto* const to = reinterpret_cast<std::byte*>(stage);
    if (unit < units) {
        const int row = unit / (dim / 8), column = unit % (dim / 8) * 8;
        auto weights = load_pack<8>(hidden_weight + row * dim + column);
        const auto gammas = load_pack<8>(gamma + column);
        for (int e = 0; e < 8; ++e)
            weights.values[e] =
                static_cast<T>(static_cast<float>(weights.values[e]) * static_cast<float>(gammas.values[e]));
        store_pack(reinterpret_cast<T*>(to + column / panel_columns * weight_bytes +
                                        swizzled(row, column % panel_columns / 8)),
                   weights);
    } else if (unit < 2 * units) {
        const int row = (unit - units) / (hidden / 8), column = (unit - units) % (hidden / 8) * 8;
        store_pack(reinterpret_cast<T*>(to + (panels + row / 64) * weight_bytes + column / panel_columns * (64 * 128) +
                                        swizzled(row % 64, column % panel_columns / 8)),
                   load_pack<8>(project_weight + row * hidden + column));
    }
}

/// The producer: for each tile it loads the panels of x with their columns of hidden_weight, then project_weight.
__device__ inline void produce(Shared& shared, const CUtensorMap& x, const void* weights, int tiles) {
    PipelineState state;
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x))
        for (int step = 0; step < steps; ++step, state.next()) {
            auto& stage = shared.stage[state.stage];
            hopper::Barrier& full = shared.full[state.stage];
            if (state.round > 0) shared.empty[state.stage].wait((state.round - 1) & 1);
            full.expect(weight_bytes + (step < panels ? panel_bytes : 0));
            hopper::bulk_load(stage.weights, static_cast<const std::byte*>(weights) + step * weight_bytes, weight_bytes,
                              full);
            if (step < panels) hopper::tensor_load(stage.x, x, step * panel_columns, tile * tile_rows, full);
        }
}

/// Sums ‖x‖² of a warp's 16 rows. Two lanes share a row.
template <typename T>
class RowSquares {
public:
    /// Adds the squares in one panel of x, whose rows from `first_row` on are the warp's.
    __device__ void add(const std::byte* panel, int first_row, int lane) {
        const int row = first_row + lane / 2;
#pragma unroll
        for (int unit = 0; unit < 4; ++unit) {
            const uint4 pairs = *reinterpret_cast<const uint4*>(panel + swizzled(row, lane % 2 * 4 + unit));
            const std::uint32_t pair[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float2 values = unpack_pair<T>(pair[e]);
                sums_[e] = ::fmaf(values.x, values.x, ::fmaf(values.y, values.y, sums_[e]));
            }
        }
    }
    /// ‖x‖² of the lane's row.
    __device__ float total() const {
        const float half = (sums_[0] + sums_[1]) + (sums_[2] + sums_[3]);
        return half + __shfl_xor_sync(0xffffffffu, half, 1);
    }

private:
    float sums_[4] = {};
};

/// Which accumulators of a product a consumer thread has: see hopper::product.
struct ConsumerThread {
    __device__ ConsumerThread()
        : group(static_cast<int>(threadIdx.x) / warpgroup - 1),
          thread(static_cast<int>(threadIdx.x) % warpgroup),
          lane(thread % warp_size),
          first_row(group * 64 + thread / warp_size * warp_rows),
          upper(lane / 4),
          pair(2 * (lane % 4)) {}
    int group, thread, lane;
    int first_row;  // of the warp, in the tile
    int upper;      // the first of its two rows, 8 apart, among the warp's
    int pair;       // the first of its two columns in each eight
};

/// Writes the hidden layer before GELU, 32 columns at a time. It goes through the warp's staging buffer, so that
/// neighbouring lanes write neighbouring columns.
template <typename T>
__device__ void write_pre_activation(T* pre_activation, const std::uint32_t (&h)[64], void* staging,
                                     const ConsumerThread& at, Index first, Index rows) {
    auto* const words = static_cast<std::uint32_t(*)[20]>(staging);  // padded against bank conflicts
#pragma unroll
    for (int i = 0; i < hidden / epilogue_columns; ++i) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            words[at.upper][4 * j + at.pair / 2] = h[8 * i + 2 * j];
            words[at.upper + 8][4 * j + at.pair / 2] = h[8 * i + 2 * j + 1];
        }
        __syncwarp();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = at.lane / 4 + 8 * r, unit = at.lane % 4;
            if (first + row < rows)
                *reinterpret_cast<uint4*>(pre_activation + (first + row) * hidden + i * epilogue_columns + 8 * unit) =
                    *reinterpret_cast<const uint4*>(&words[row][4 * unit]);
        }
    }
}

/// Loads the summand of a block of 64 columns of y in the layout of write_columns: added[i][r] has four consecutive
/// columns of the i-th 32, in row lane / 8 + 4 r of the warp's rows.
template <typename T>
__device__ void load_added(uint2 (&added)[2][4], const T* add, Index first, Index column, Index rows, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const Index row = first + lane / 8 + 4 * r;
            added[i][r] = {};
            if (add != nullptr && row < rows)
                added[i][r] =
                    *reinterpret_cast<const uint2*>(add + row * dim + column + i * epilogue_columns + lane % 8 * 4);
        }
}

/// The epilogue of a block of 64 columns: y = own + bias + added. It goes through the warp's staging buffer, so that
/// neighbouring lanes write neighbouring columns.
template <typename T>
__device__ void write_columns(T* y, const float (&own)[32], const uint2 (&added)[2][4],
                              const std::uint32_t* project_bias, float (&staging)[warp_rows][epilogue_columns + 8],
                              const ConsumerThread& at, Index first, Index column, Index rows) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float* const from = own + 16 * i + 4 * j;
            *reinterpret_cast<float2*>(&staging[at.upper][8 * j + at.pair]) = {from[0], from[1]};
            *reinterpret_cast<float2*>(&staging[at.upper + 8][8 * j + at.pair]) = {from[2], from[3]};
        }
        __syncwarp();
        const Index to = column + i * epilogue_columns + at.lane % 8 * 4;
        const uint2 bias = *reinterpret_cast<const uint2*>(&project_bias[to / 2]);
        const float2 bias_low = unpack_pair<T>(bias.x), bias_high = unpack_pair<T>(bias.y);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int row = at.lane / 8 + 4 * r;
            const float4 four = *reinterpret_cast<const float4*>(&staging[row][at.lane % 8 * 4]);
            const float2 low = unpack_pair<T>(added[i][r].x), high = unpack_pair<T>(added[i][r].y);
            if (first + row < rows)  // evicted first from L2, so that x and `add` stay in it
                __stcs(reinterpret_cast<uint2*>(y + (first + row) * dim + to),
                       make_uint2(pack_pair<T>(four.x + bias_low.x + low.x, four.y + bias_low.y + low.y),
                                  pack_pair<T>(four.z + bias_high.x + high.x, four.w + bias_high.y + high.y)));
        }
    }
}

/// A consumer warpgroup: 64 rows of each tile from the first product to y.
template <typename T>
__device__ void consume(Shared& shared, T* y, T* pre_activation, const T* add, RowList to_recompute, Index rows,
                        int tiles) {
    const ConsumerThread at;
    auto& staging = shared.epilogue[static_cast<int>(threadIdx.x) / warp_size - warpgroup / warp_size];
    std::uint32_t h[64];
    PipelineState state;
    int previous = 0;                      // the stage that the last products may still read
    const auto release = [&](int stage) {  // each warp arrives, because its own loads of x must be done, too
        __syncwarp();
        if (at.lane == 0) shared.empty[stage].arrive();
    };
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
        const Index first = static_cast<Index>(tile) * tile_rows + at.first_row;
        float sum[128];
        RowSquares<T> squares;
#pragma unroll
        for (int panel = 0; panel < panels; ++panel, state.next()) {
            shared.full[state.stage].wait(state.round & 1);
            squares.add(shared.stage[state.stage].x, at.first_row, at.lane);
            const auto a =
                hopper::matrix_descriptor(shared.stage[state.stage].x + at.group * (panel_bytes / consumers));
            const auto b = hopper::matrix_descriptor(shared.stage[state.stage].weights);
            hopper::fence_products();
#pragma unroll
            for (int k = 0; k < panel_columns / 16; ++k)
                hopper::product<T>(sum, a + 2 * k, b + 2 * k, panel > 0 || k > 0);
            hopper::commit_products();
            if (panel > 0) {
                hopper::wait_products<1>();
                release(previous);
            }
            previous = state.stage;
        }
        hopper::wait_products<0>();
        release(previous);

        const float square = squares.total();
        if (at.lane % 2 == 0 && !isfinite(square) && first + at.lane / 2 < rows)
            to_recompute.rows[atomicAdd(to_recompute.count, 1u)] = static_cast<int>(first + at.lane / 2);
        const float scale =
            ::sqrtf(static_cast<float>(dim)) / ::fmaxf(::sqrtf(square), static_cast<float>(rms_norm_floor));
        const float upper = __shfl_sync(0xffffffffu, scale, 2 * at.upper);
        const float lower = __shfl_sync(0xffffffffu, scale, 2 * at.upper + 16);
#pragma unroll
        for (int j = 0; j < 32; ++j) {
            const float2 bias = unpack_pair<T>(shared.hidden_bias[4 * j + at.pair / 2]);
            h[2 * j] = pack_pair<T>(::fmaf(sum[4 * j], upper, bias.x), ::fmaf(sum[4 * j + 1], upper, bias.y));
            h[2 * j + 1] = pack_pair<T>(::fmaf(sum[4 * j + 2], lower, bias.x), ::fmaf(sum[4 * j + 3], lower, bias.y));
        }
        if (pre_activation != nullptr) write_pre_activation(pre_activation, h, &staging, at, first, rows);
#pragma unroll
        for (std::uint32_t& pair : h) {
            const float2 values = unpack_pair<T>(pair);
            pair = pack_pair<T>(Gelu<T>(values.x).value, Gelu<T>(values.y).value);
        }

#pragma unroll 1
        for (int block = 0; block < column_blocks; ++block, state.next()) {
            float own[32];
            uint2 added[2][4];
            load_added(added, add, first, block * 64, rows, at.lane);
            shared.full[state.stage].wait(state.round & 1);
            hopper::fence_products();
#pragma unroll
            for (int k = 0; k < hidden / 16; ++k) {
                const auto b = hopper::matrix_descriptor(shared.stage[state.stage].weights + k / 4 * (64 * 128));
                hopper::product<T>(own, h + 4 * k, b + 2 * (k % 4), k > 0);
            }
            hopper::commit_products();
            hopper::wait_products<0>();
            release(state.stage);
            write_columns(y, own, added, shared.project_bias, staging, at, first, block * 64, rows);
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(hopper::launch_bound<threads>, 1)
    feed_forward(const __grid_constant__ CUtensorMap x, T* y, const T* weights, const T* hidden_bias,
                 const T* project_bias, T* pre_activation, const T* add, RowList to_recompute, Index rows, int tiles) {
#if defined(COLT5_HOPPER)
    extern __shared__ std::byte memory[];
    auto& shared = *reinterpret_cast<Shared*>((reinterpret_cast<std::uintptr_t>(memory) + 1023) / 1024 * 1024);
    for (int i = static_cast<int>(threadIdx.x); i < hidden / 2; i += threads)
        shared.hidden_bias[i] = reinterpret_cast<const std::uint32_t*>(hidden_bias)[i];
    for (int i = static_cast<int>(threadIdx.x); i < dim / 2; i += threads)
        shared.project_bias[i] = reinterpret_cast<const std::uint32_t*>(project_bias)[i];
    if (threadIdx.x == 0) {
        for (hopper::Barrier& barrier : shared.full) barrier.init(1);
        for (hopper::Barrier& barrier : shared.empty) barrier.init(consumers * warpgroup / warp_size);
        hopper::fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < warpgroup) {
        hopper::lower_registers<40>();
        if (threadIdx.x == 0) produce(shared, x, weights, tiles);
    } else {
        hopper::raise_registers<232>();
        consume(shared, y, pre_activation, add, to_recompute, rows, tiles);
    }
#endif
}

}  // namespace colt5::cuda::fused
