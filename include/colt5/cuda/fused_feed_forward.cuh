// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <colt5/cuda/gelu.cuh>
#include <colt5/cuda/hopper.cuh>
#include <colt5/cuda/pack.cuh>
#include <colt5/cuda/rms_norm.cuh>
#include <colt5/op/feed_forward.hpp>

/// The light feedforward as one kernel of compute capability 9.0a, for a model dimension of 512 and a hidden layer of
/// 256: what lies between x and y never leaves the multiprocessor, and the hidden layer stays in registers.
///
///     RMSNorm scales rows, and gamma columns:  norm(x) · hidden_weightᵀ = s ∘ (x · (hidden_weight ∘ gamma)ᵀ)
///
/// so that x goes into the first product as it is; s, found meanwhile, multiplies the result. One thread streams x and
/// the weights through a ring of stages; two warpgroups have 64 rows of a tile each.
namespace colt5::cuda::fused {

using namespace hopper;

inline constexpr int dim = 512, hidden = 256, tile_rows = 128, panel_columns = 64, panels = dim / panel_columns;
inline constexpr int warpgroup = 128, consumers = 2, threads = (1 + consumers) * warpgroup, stages = 4;
inline constexpr int panel_bytes = tile_rows * panel_columns * 2;  // 64 columns of a tile of x
inline constexpr int weight_bytes = hidden * panel_columns * 2;    // of a stage
inline constexpr int parts = dim / 64;                             // of y, 64 columns each
inline constexpr int chunks = panels + parts;                      // that go through the ring for a tile
inline constexpr int warp_rows = 16, turned_columns = 32;

/// What the kernel keeps in shared memory.
struct Shared {
    struct alignas(1024) Stage {
        std::byte weights[weight_bytes], x[panel_bytes];
    };
    Stage stage[stages];
    float turned[consumers * 4][warp_rows][turned_columns + 8];  // of each warp; padded against bank conflicts
    std::uint32_t hidden_bias[hidden / 2], project_bias[dim / 2];
    Barrier full[stages], empty[stages];
};
inline constexpr int shared_bytes = static_cast<int>(sizeof(Shared)) + 1024;  // may have to be aligned

/// Rows that are left to redo_rows: of numbers whose squares overflow, or that are not finite.
struct Redo {
    unsigned count;
    int row[1];  // as many as there are
};

/// Where 16-byte unit `unit` of a row is in a panel.
__device__ inline int swizzled(int row, int unit) {
    return row * 128 + ((unit ^ (row & 7)) << 4);
}

/// A slot of the ring, and how often the ring has turned.
struct Slot {
    int stage = 0;
    unsigned turn = 0;
    __device__ void next() {
        if (++stage == stages) {
            stage = 0;
            ++turn;
        }
    }
};

/// Two numbers of 16 bits.
template <HalfPrecision T>
__device__ inline float2 unpack(std::uint32_t pair) {
    if constexpr (std::is_same_v<T, bfloat16>)
        return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
    float2 values;
    asm("{\n.reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\n"
        "cvt.f32.f16 %1, high;\n}\n"
        : "=f"(values.x), "=f"(values.y)
        : "r"(pair));
    return values;
}
template <HalfPrecision T>
__device__ inline std::uint32_t pack(float low, float high) {
    std::uint32_t pair;
    if constexpr (std::is_same_v<T, bfloat16>)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/// Both weights as the stages hold them: hidden_weight ∘ gamma by 64 columns, then project_weight by 64 rows, whose 256
/// columns are four panels. Nothing has to be redone yet.
template <typename T>
__global__ void lay_out_weights(T* stage, Redo* redo, const T* hidden_weight, const T* gamma, const T* project_weight) {
    constexpr int units = hidden * dim / 8;  // of 16 bytes, in each weight
    const int unit = static_cast<int>(global_thread());
    if (unit == 0) redo->count = 0;
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

/// Loads the stages: for each tile the panels of x with their columns of hidden_weight, then project_weight.
__device__ inline void produce(Shared& shared, const CUtensorMap& x, const void* weights, int tiles) {
    Slot slot;
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x))
        for (int chunk = 0; chunk < chunks; ++chunk, slot.next()) {
            auto& stage = shared.stage[slot.stage];
            Barrier& full = shared.full[slot.stage];
            if (slot.turn > 0) shared.empty[slot.stage].wait((slot.turn - 1) & 1);
            full.expect(weight_bytes + (chunk < panels ? panel_bytes : 0));
            bulk_load(stage.weights, static_cast<const std::byte*>(weights) + chunk * weight_bytes, weight_bytes, full);
            if (chunk < panels) tensor_load(stage.x, x, chunk * panel_columns, tile * tile_rows, full);
        }
}

/// ‖x‖² of the rows of a warp: two lanes share a row.
template <typename T>
class RowSquares {
public:
    /// Goes along with the warp's rows, from `first_row` on, of a panel of x.
    __device__ void add(const std::byte* panel, int first_row, int lane) {
        const int row = first_row + lane / 2;
#pragma unroll
        for (int unit = 0; unit < 4; ++unit) {
            const uint4 pairs = *reinterpret_cast<const uint4*>(panel + swizzled(row, lane % 2 * 4 + unit));
            const std::uint32_t pair[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float2 values = unpack<T>(pair[e]);
                sums_[e] = ::fmaf(values.x, values.x, ::fmaf(values.y, values.y, sums_[e]));
            }
        }
    }
    /// Of the lane's row.
    __device__ float total() const {
        const float half = (sums_[0] + sums_[1]) + (sums_[2] + sums_[3]);
        return half + __shfl_xor_sync(0xffffffffu, half, 1);
    }

private:
    float sums_[4] = {};
};

/// Where a thread's numbers of a product are.
struct Place {
    __device__ Place()
        : group(static_cast<int>(threadIdx.x) / warpgroup - 1),
          thread(static_cast<int>(threadIdx.x) % warpgroup),
          lane(thread % warp_size),
          first_row(group * 64 + thread / warp_size * warp_rows),
          upper(lane / 4),
          pair(2 * (lane % 4)) {}
    int group, thread, lane;
    int first_row;  // of the warp, in the tile
    int upper;      // the upper of two rows, 8 apart, in the warp's
    int pair;       // the first of two columns in each eight
};

/// Writes the hidden layer before GELU, 32 columns at a time, turned so that the lanes write neighbours.
template <typename T>
__device__ void write_before(T* before, const std::uint32_t (&h)[64], void* turned, const Place& at, Index first,
                             Index rows) {
    auto* const words = static_cast<std::uint32_t(*)[20]>(turned);  // padded against bank conflicts
#pragma unroll
    for (int i = 0; i < hidden / turned_columns; ++i) {
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
                *reinterpret_cast<uint4*>(before + (first + row) * hidden + i * turned_columns + 8 * unit) =
                    *reinterpret_cast<const uint4*>(&words[row][4 * unit]);
        }
    }
}

/// What is added to a part of y, as write_part takes it: of 32 columns a lane has four, in every fourth of the warp's
/// rows.
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
                    *reinterpret_cast<const uint2*>(add + row * dim + column + i * turned_columns + lane % 8 * 4);
        }
}

/// y = own + bias + added in a part's columns, turned so that the lanes write neighbours.
template <typename T>
__device__ void write_part(T* y, const float (&own)[32], const uint2 (&added)[2][4], const std::uint32_t* project_bias,
                           float (&turned)[warp_rows][turned_columns + 8], const Place& at, Index first, Index column,
                           Index rows) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float* const from = own + 16 * i + 4 * j;
            *reinterpret_cast<float2*>(&turned[at.upper][8 * j + at.pair]) = {from[0], from[1]};
            *reinterpret_cast<float2*>(&turned[at.upper + 8][8 * j + at.pair]) = {from[2], from[3]};
        }
        __syncwarp();
        const Index to = column + i * turned_columns + at.lane % 8 * 4;
        const uint2 bias = *reinterpret_cast<const uint2*>(&project_bias[to / 2]);
        const float2 bias_low = unpack<T>(bias.x), bias_high = unpack<T>(bias.y);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int row = at.lane / 8 + 4 * r;
            const float4 four = *reinterpret_cast<const float4*>(&turned[row][at.lane % 8 * 4]);
            const float2 low = unpack<T>(added[i][r].x), high = unpack<T>(added[i][r].y);
            if (first + row < rows)  // not to be kept in the cache, where x should stay until it is added
                __stcs(reinterpret_cast<uint2*>(y + (first + row) * dim + to),
                       make_uint2(pack<T>(four.x + bias_low.x + low.x, four.y + bias_low.y + low.y),
                                  pack<T>(four.z + bias_high.x + high.x, four.w + bias_high.y + high.y)));
        }
    }
}

/// The products, and what lies between them, of 64 rows of each tile.
template <typename T>
__device__ void consume(Shared& shared, T* y, T* before, const T* add, Redo* redo, Index rows, int tiles) {
    const Place at;
    auto& turned = shared.turned[static_cast<int>(threadIdx.x) / warp_size - warpgroup / warp_size];
    std::uint32_t h[64];
    Slot slot;
    int previous = 0;                      // the stage that is still read
    const auto release = [&](int stage) {  // each warp has read x by loads of its own
        __syncwarp();
        if (at.lane == 0) shared.empty[stage].arrive();
    };
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
        const Index first = static_cast<Index>(tile) * tile_rows + at.first_row;
        float sum[128];
        RowSquares<T> squares;
#pragma unroll
        for (int panel = 0; panel < panels; ++panel, slot.next()) {
            shared.full[slot.stage].wait(slot.turn & 1);
            squares.add(shared.stage[slot.stage].x, at.first_row, at.lane);
            const auto a = matrix_descriptor(shared.stage[slot.stage].x + at.group * (panel_bytes / consumers));
            const auto b = matrix_descriptor(shared.stage[slot.stage].weights);
            fence_products();
#pragma unroll
            for (int k = 0; k < panel_columns / 16; ++k) product<T>(sum, a + 2 * k, b + 2 * k, panel > 0 || k > 0);
            commit_products();
            if (panel > 0) {
                wait_products<1>();
                release(previous);
            }
            previous = slot.stage;
        }
        wait_products<0>();
        release(previous);

        const float square = squares.total();
        if (at.lane % 2 == 0 && !isfinite(square) && first + at.lane / 2 < rows)
            redo->row[atomicAdd(&redo->count, 1u)] = static_cast<int>(first + at.lane / 2);
        const float scale =
            ::sqrtf(static_cast<float>(dim)) / ::fmaxf(::sqrtf(square), static_cast<float>(rms_norm_floor));
        const float upper = __shfl_sync(0xffffffffu, scale, 2 * at.upper);
        const float lower = __shfl_sync(0xffffffffu, scale, 2 * at.upper + 16);
#pragma unroll
        for (int j = 0; j < 32; ++j) {
            const float2 bias = unpack<T>(shared.hidden_bias[4 * j + at.pair / 2]);
            h[2 * j] = pack<T>(::fmaf(sum[4 * j], upper, bias.x), ::fmaf(sum[4 * j + 1], upper, bias.y));
            h[2 * j + 1] = pack<T>(::fmaf(sum[4 * j + 2], lower, bias.x), ::fmaf(sum[4 * j + 3], lower, bias.y));
        }
        if (before != nullptr) write_before(before, h, &turned, at, first, rows);
#pragma unroll
        for (std::uint32_t& pair : h) {
            const float2 values = unpack<T>(pair);
            pair = pack<T>(Gelu<T>(values.x).value, Gelu<T>(values.y).value);
        }

#pragma unroll 1
        for (int part = 0; part < parts; ++part, slot.next()) {
            float own[32];
            uint2 added[2][4];
            load_added(added, add, first, part * 64, rows, at.lane);
            shared.full[slot.stage].wait(slot.turn & 1);
            fence_products();
#pragma unroll
            for (int k = 0; k < hidden / 16; ++k) {
                const auto b = matrix_descriptor(shared.stage[slot.stage].weights + k / 4 * (64 * 128));
                product<T>(own, h + 4 * k, b + 2 * (k % 4), k > 0);
            }
            commit_products();
            wait_products<0>();
            release(slot.stage);
            write_part(y, own, added, shared.project_bias, turned, at, first, part * 64, rows);
        }
    }
}

#if defined(COLT5_HOPPER) || !defined(__CUDA_ARCH__)
inline constexpr int bound = threads;
#else
inline constexpr int bound = warp_size;  // from which the host learns that this code is for another processor
#endif

template <typename T>
__global__ void __launch_bounds__(bound, 1)
    feed_forward(const __grid_constant__ CUtensorMap x, T* y, const T* weights, const T* hidden_bias,
                 const T* project_bias, T* before, const T* add, Redo* redo, Index rows, int tiles) {
#if defined(COLT5_HOPPER)
    extern __shared__ std::byte memory[];
    auto& shared = *reinterpret_cast<Shared*>((reinterpret_cast<std::uintptr_t>(memory) + 1023) / 1024 * 1024);
    for (int i = static_cast<int>(threadIdx.x); i < hidden / 2; i += threads)
        shared.hidden_bias[i] = reinterpret_cast<const std::uint32_t*>(hidden_bias)[i];
    for (int i = static_cast<int>(threadIdx.x); i < dim / 2; i += threads)
        shared.project_bias[i] = reinterpret_cast<const std::uint32_t*>(project_bias)[i];
    if (threadIdx.x == 0) {
        for (Barrier& barrier : shared.full) barrier.init(1);
        for (Barrier& barrier : shared.empty) barrier.init(consumers * warpgroup / warp_size);
        fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < warpgroup) {
        lower_registers<40>();
        if (threadIdx.x == 0) produce(shared, x, weights, tiles);
    } else {
        raise_registers<232>();
        consume(shared, y, before, add, redo, rows, tiles);
    }
#endif
}

/// The rows that feed_forward left, one by one: a block has a row.
template <typename T>
__global__ void __launch_bounds__(hidden)
    redo_rows(const Redo* redo, T* y, T* before, const T* x, const T* gamma, const bool* mask, const T* hidden_weight,
              const T* hidden_bias, const T* project_weight, const T* project_bias, const T* add) {
    __shared__ float normed[dim], h[hidden];
    const int thread = static_cast<int>(threadIdx.x), warp = thread / warp_size, lane = thread % warp_size;
    for (unsigned i = blockIdx.x; i < redo->count; i += gridDim.x) {
        const Index row = redo->row[i];
        if (warp == 0) {
            const WarpRow<T, 8, 2> in(x + row * dim, dim, is_padding(mask, row));
            const RowScale<float> of_row(in, dim);
            in.for_each([&](Index j, const auto& xs) {
                for (int e = 0; e < 8; ++e)
                    normed[j + e] = static_cast<float>(
                        static_cast<T>(of_row.in_unit(xs.values[e]) * of_row.scale * static_cast<float>(gamma[j + e])));
            });
        }
        __syncthreads();
        for (int j = warp; j < hidden; j += hidden / warp_size) {
            float sum = 0;
            for (int k = lane; k < dim; k += warp_size)
                sum += normed[k] * static_cast<float>(hidden_weight[j * dim + k]);
            const T value = static_cast<T>(warp_sum(sum) + static_cast<float>(hidden_bias[j]));
            if (lane == 0 && before != nullptr) before[row * hidden + j] = value;
            if (lane == 0) h[j] = static_cast<float>(static_cast<T>(Gelu<T>(static_cast<float>(value)).value));
        }
        __syncthreads();
        for (int j = warp; j < dim; j += hidden / warp_size) {
            float sum = 0;
            for (int k = lane; k < hidden; k += warp_size)
                sum += h[k] * static_cast<float>(project_weight[j * hidden + k]);
            sum = warp_sum(sum) + static_cast<float>(project_bias[j]);
            if (add != nullptr) sum += static_cast<float>(add[row * dim + j]);
            if (lane == 0) y[row * dim + j] = static_cast<T>(sum);
        }
        __syncthreads();
    }
}

/// Whether the kernel can do it on this device, which does not depend on the number of tokens.
template <typename T>
bool takes(const Cuda& policy, TokensView<T> y, TokensView<T> before, TokensView<const T> x,
           const FeedForwardParameters<const T>& parameters, TokensView<const T> add) {
    if (x.extent(2) != dim || parameters.hidden_weight.extent(0) != hidden ||
        !fits_packs<T>(dim, y.data(), before.data(), x.data(), add.data(), parameters.norm.gamma.data(),
                       parameters.hidden_weight.data(), parameters.hidden_bias.data(), parameters.project_weight.data(),
                       parameters.project_bias.data()))
        return false;
    const DeviceGuard guard(policy.device());
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, feed_forward<T>), "cudaFuncGetAttributes");
    return attributes.maxThreadsPerBlock >= threads;
}

template <typename T>
void launch_feed_forward(const Cuda& policy, TokensView<T> y, TokensView<T> before, TokensView<const T> x,
                         const FeedForwardParameters<const T>& parameters, TokensView<const T> add) {
    const Index rows = x.extent(0) * x.extent(1), tiles = divide_up(rows, Index{tile_rows});
    if (rows == 0) return;
    const auto& [norm, hidden_weight, hidden_bias, project_weight, project_bias] = parameters;
    VectorTensor<T, Cuda> weights(policy, {2 * hidden * dim});
    VectorTensor<int, Cuda> redo(policy, {1 + rows});
    auto* const to_redo = reinterpret_cast<Redo*>(redo.data());
    constexpr int layout_threads = 256;
    launch(policy, "lay_out_weights", lay_out_weights<T>, grid(divide_up(2 * hidden * dim / 8, layout_threads)),
           layout_threads, 0, weights.data(), to_redo, hidden_weight.data(), norm.gamma.data(), project_weight.data());
    int processors = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, policy.device()),
          "cudaDeviceGetAttribute");
    launch(policy, "feed_forward", feed_forward<T>, grid(std::min(tiles, Index{processors})), threads, shared_bytes,
           tensor_map<T>(x.data(), rows, dim, tile_rows), y.data(), static_cast<const T*>(weights.data()),
           hidden_bias.data(), project_bias.data(), before.data(), add.data(), to_redo, rows, static_cast<int>(tiles));
    launch(policy, "redo_rows", redo_rows<T>, grid(std::min(rows, Index{processors})), hidden, 0,
           static_cast<const Redo*>(to_redo), y.data(), before.data(), x.data(), norm.gamma.data(),
           norm.clean_mask.data(), hidden_weight.data(), hidden_bias.data(), project_weight.data(), project_bias.data(),
           add.data());
}

}  // namespace colt5::cuda::fused
