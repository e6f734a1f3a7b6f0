// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention_tile.cuh>

/// The vector-Jacobian product of attention, in two kernels that each own what they write, so that nothing is added in
/// an order that varies. With s = q·k · scale, p = exp(s − log_sum_exp), dp = value_scale · d_out·v, D = out·d_out:
///
///     ds = p (dp − D),   d_q = scale · ds k,   d_k = scale · dsᵀ q,   d_v = value_scale · pᵀ d_out
namespace colt5::cuda {

/// What only backward reads and writes.
template <typename T>
struct AttentionGradients {
    using Sum = accumulate_t<T>;

    const T *out, *d_out;    // as Attention::out
    const Sum* log_sum_exp;  // (batch, heads, queries)
    T *d_q, *d_k, *d_v;      // as Attention::q, k and v
    Sum* d_value_scale;      // (batch, heads, keys) or null: the share of each head
};

/// The sizes of the backward kernels: each warp owns 16 queries or keys, and blocks of the others pass through shared
/// memory.
template <typename Arithmetic, int width>
struct BackwardShape {
    using T = typename Arithmetic::Scalar;
    using Sum = typename Arithmetic::Sum;
    static constexpr int row_bytes = width * sizeof(T);
    static constexpr int warps = row_bytes <= 512 ? 4 : 2;
    static constexpr int own = 16 * warps, threads = warp_size * warps;
    static constexpr int passing = row_bytes <= 128 ? 64 : row_bytes <= 256 ? 32 : 16;
    static constexpr int stages = row_bytes <= 256 ? 2 : 1;
    static constexpr int registers_per_left = row_bytes / 8;  // of one thread, for tensor-core arithmetics
    static constexpr bool left_is_resident(int accumulators) {
        return 2 * registers_per_left + accumulators * width / 2 <= 160;
    }
    static constexpr int blocks_per_multiprocessor(int accumulators) {
        const int registers = 2 * registers_per_left + accumulators * width / 2 * static_cast<int>(sizeof(Sum)) / 4;
        return registers <= 64 ? 4 : registers <= 104 ? 3 : registers <= 128 ? 2 : 1;
    }

    struct Stage {
        T first[passing * Tile<Arithmetic, width>::stride], second[passing * Tile<Arithmetic, width>::stride];
        Sum of_row[2][passing];
        bool visible[passing];
    };
    struct Shared {
        T first[own * Tile<Arithmetic, width>::stride], second[own * Tile<Arithmetic, width>::stride];
        Sum of_row[own];
        Stage stage[stages];
    };
};

/// d_q and D, by tiles of queries.
template <typename Arithmetic, int width>
__global__ void __launch_bounds__(BackwardShape<Arithmetic, width>::threads,
                                  BackwardShape<Arithmetic, width>::blocks_per_multiprocessor(1))
    attention_query_gradient(const Attention<typename Arithmetic::Scalar> a,
                             const AttentionGradients<typename Arithmetic::Scalar> d, int tiles,
                             typename Arithmetic::Sum* out_dots) {
    using T = typename Arithmetic::Scalar;
    using Sum = typename Arithmetic::Sum;
    using Shape = BackwardShape<Arithmetic, width>;
    using Rows16 = Tile<Arithmetic, width>;
    using Side = Left<Arithmetic, width, Shape::left_is_resident(1)>;
    constexpr Sum infinity = std::numeric_limits<Sum>::infinity();
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);

    const AttentionBlock<T> block(a, Shape::own, tiles);
    const Rows<const T> k = block.rows(a, a.k), v = block.rows(a, a.v), out = block.rows(a, a.out.with(d.out));
    const Sight sight(block.first, Shape::own, a.reach, a.keys);
    const int key_blocks = (sight.end - sight.begin + Shape::passing - 1) / Shape::passing;
    const auto load_keys = [&](int i) {
        auto& stage = shared.stage[i % Shape::stages];
        const int first = sight.begin + i * Shape::passing;
        Rows16::template load<Shape::passing, Shape::threads>(stage.first, k, first, sight.end, a.dim_head, a.vectors);
        Rows16::template load<Shape::passing, Shape::threads>(stage.second, v, first, sight.end, a.dim_head, a.vectors);
        const int row = static_cast<int>(threadIdx.x);
        if (row < Shape::passing) {
            const bool real = first + row < sight.end;
            const Index at = block.of_keys(a) + first + row;
            stage.visible[row] = real && (a.mask == nullptr || a.mask[at]);
            if (a.value_scale != nullptr) stage.of_row[0][row] = real ? a.value_scale[at] : Sum(0);
        }
        end_copy_group();
    };
    Rows16::template load<Shape::own, Shape::threads>(shared.first, block.rows(a, a.q), block.first, a.queries,
                                                      a.dim_head, a.vectors);
    Rows16::template load<Shape::own, Shape::threads>(shared.second, block.rows(a, a.out.with(d.d_out)), block.first,
                                                      a.queries, a.dim_head, a.vectors);
    load_keys(0);
    wait_for_copies<0>();
    __syncthreads();

    const int warp = warp_id(), first = block.first + 16 * warp;
    {  // D: two lanes a row
        const int row = lane_id() / 2, query = first + row;
        const T* const d_out = shared.second + (16 * warp + row) * Rows16::stride;
        Sum dot = 0;
        if (query < a.queries) {
            const T* const of_row = out[query];
            constexpr int lanes = Rows16::lanes;
            if (a.vectors) {
                for (int c = lane_id() % 2 * lanes; c < a.dim_head; c += 2 * lanes) {
                    alignas(16) T values[lanes];
                    *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(of_row + c);
#pragma unroll
                    for (int e = 0; e < lanes; ++e) dot += static_cast<Sum>(values[e]) * static_cast<Sum>(d_out[c + e]);
                }
            } else {
                for (int c = lane_id() % 2; c < a.dim_head; c += 2)
                    dot += static_cast<Sum>(of_row[c]) * static_cast<Sum>(d_out[c]);
            }
        }
        dot += __shfl_xor_sync(0xffffffffu, dot, 1);
        if (lane_id() % 2 == 0) {
            shared.of_row[16 * warp + row] = dot;
            if (query < a.queries) out_dots[block.of_queries(a) + query] = dot;
        }
        __syncwarp();
    }

    T* const own = shared.first + 16 * warp * Rows16::stride;
    const Side q(own), d_out(shared.second + 16 * warp * Rows16::stride);
    const Sum to_log2 = a.scale * static_cast<Sum>(log2_e);
    Sum log_sum[2], out_dot[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int query = first + accumulator_row() + 8 * half;
        const Sum log_sum_exp = query < a.queries ? d.log_sum_exp[block.of_queries(a) + query] : -infinity;
        log_sum[half] = log_sum_exp == -infinity ? infinity : log_sum_exp * static_cast<Sum>(log2_e);
        out_dot[half] = shared.of_row[16 * warp + accumulator_row() + 8 * half];
    }
    Sum sum[width / 8][4] = {};

    pipeline<Shape::stages>(key_blocks, load_keys, [&](int i) {
        const auto& stage = shared.stage[i % Shape::stages];
        const int block_first = sight.begin + i * Shape::passing;
        const bool incomplete = a.mask != nullptr || block_first + Shape::passing > sight.end;
#pragma unroll
        for (int group = 0; group < Shape::passing / 16; ++group) {
            const int columns = block_first + 16 * group;
            const Overlap overlap(first, columns, a.reach);
            if (!overlap.any || columns >= sight.end) continue;
            Sum p[2][4], d_p[2][4];
            multiply_transposed(p, q, stage.first + 16 * group * Rows16::stride);
            multiply_transposed(d_p, d_out, stage.second + 16 * group * Rows16::stride);
            const bool partial = incomplete || !overlap.all;
            const int offset = columns + accumulator_column() - first - accumulator_row();  // key − query
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int column = 16 * group + accumulator_column() + 8 * j + e % 2;
                    Sum weight = power_of_two(p[j][e] * to_log2 - log_sum[e / 2]);
                    if (partial && (abs(offset + 8 * j + e % 2 - e / 2 * 8) > a.reach || !stage.visible[column]))
                        weight = 0;
                    if (a.value_scale != nullptr) d_p[j][e] *= stage.of_row[0][column];
                    d_p[j][e] = weight * (d_p[j][e] - out_dot[e / 2]);
                }
            Arithmetic::template multiply<width>(sum, d_p, stage.first + 16 * group * Rows16::stride);
        }
    });
    Rows16::store(own, sum, a.scale, a.scale, block.rows(a, a.q.with(d.d_q)), first, a.queries, a.dim_head, a.vectors);
}

/// d_k, d_v and each head's share of d_value_scale, by tiles of keys.
template <typename Arithmetic, int width>
__global__ void __launch_bounds__(BackwardShape<Arithmetic, width>::threads,
                                  BackwardShape<Arithmetic, width>::blocks_per_multiprocessor(2))
    attention_key_gradient(const Attention<typename Arithmetic::Scalar> a,
                           const AttentionGradients<typename Arithmetic::Scalar> d, int tiles,
                           const typename Arithmetic::Sum* out_dots) {
    using T = typename Arithmetic::Scalar;
    using Sum = typename Arithmetic::Sum;
    using Shape = BackwardShape<Arithmetic, width>;
    using Rows16 = Tile<Arithmetic, width>;
    using Side = Left<Arithmetic, width, Shape::left_is_resident(2)>;
    constexpr Sum infinity = std::numeric_limits<Sum>::infinity();
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);

    const AttentionBlock<T> block(a, Shape::own, tiles);
    const Rows<const T> queries = block.rows(a, a.q), d_outs = block.rows(a, a.out.with(d.d_out));
    const Sight sight(block.first, Shape::own, a.reach, a.queries);
    const int query_blocks = (sight.end - sight.begin + Shape::passing - 1) / Shape::passing;
    const auto load_queries = [&](int i) {
        auto& stage = shared.stage[i % Shape::stages];
        const int first = sight.begin + i * Shape::passing;
        Rows16::template load<Shape::passing, Shape::threads>(stage.first, queries, first, sight.end, a.dim_head,
                                                              a.vectors);
        Rows16::template load<Shape::passing, Shape::threads>(stage.second, d_outs, first, sight.end, a.dim_head,
                                                              a.vectors);
        const int row = static_cast<int>(threadIdx.x);
        if (row < Shape::passing) {
            const bool real = first + row < sight.end;
            const Index at = block.of_queries(a) + first + row;
            const Sum log_sum_exp = real ? d.log_sum_exp[at] : -infinity;
            stage.of_row[0][row] = log_sum_exp == -infinity ? infinity : log_sum_exp * static_cast<Sum>(log2_e);
            stage.of_row[1][row] = real ? out_dots[at] : Sum(0);
        }
        end_copy_group();
    };
    Rows16::template load<Shape::own, Shape::threads>(shared.first, block.rows(a, a.k), block.first, a.keys, a.dim_head,
                                                      a.vectors);
    Rows16::template load<Shape::own, Shape::threads>(shared.second, block.rows(a, a.v), block.first, a.keys,
                                                      a.dim_head, a.vectors);
    load_queries(0);
    wait_for_copies<0>();
    __syncthreads();

    const int warp = warp_id(), first = block.first + 16 * warp;
    T* const own_k = shared.first + 16 * warp * Rows16::stride;
    T* const own_v = shared.second + 16 * warp * Rows16::stride;
    const Side k(own_k), v(own_v);
    const Sum to_log2 = a.scale * static_cast<Sum>(log2_e);
    Sum value_scale[2] = {1, 1};
    bool real[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int key = first + accumulator_row() + 8 * half;
        real[half] = key < a.keys && (a.mask == nullptr || a.mask[block.of_keys(a) + key]);
        if (a.value_scale != nullptr && key < a.keys) value_scale[half] = a.value_scale[block.of_keys(a) + key];
    }
    Sum d_k[width / 8][4] = {}, d_v[width / 8][4] = {};

    pipeline<Shape::stages>(query_blocks, load_queries, [&](int i) {
        const auto& stage = shared.stage[i % Shape::stages];
        const int block_first = sight.begin + i * Shape::passing;
#pragma unroll
        for (int group = 0; group < Shape::passing / 16; ++group) {
            const int columns = block_first + 16 * group;
            const Overlap overlap(first, columns, a.reach);
            if (!overlap.any || columns >= sight.end) continue;
            Sum p[2][4], d_p[2][4];
            multiply_transposed(p, k, stage.first + 16 * group * Rows16::stride);
            multiply_transposed(d_p, v, stage.second + 16 * group * Rows16::stride);
            const int offset = columns + accumulator_column() - first - accumulator_row();  // query − key
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int column = 16 * group + accumulator_column() + 8 * j + e % 2;
                    p[j][e] = power_of_two(p[j][e] * to_log2 - stage.of_row[0][column]);
                    if (!overlap.all && abs(offset + 8 * j + e % 2 - e / 2 * 8) > a.reach) p[j][e] = 0;
                    d_p[j][e] = p[j][e] * (d_p[j][e] * value_scale[e / 2] - stage.of_row[1][column]);
                }
            Arithmetic::template multiply<width>(d_v, p, stage.second + 16 * group * Rows16::stride);
            Arithmetic::template multiply<width>(d_k, d_p, stage.first + 16 * group * Rows16::stride);
        }
    });

    // Rows do not mix, so that what a masked key collected is dropped only here.
#pragma unroll
    for (int j = 0; j < width / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (!real[e / 2]) d_k[j][e] = d_v[j][e] = 0;
        }
    if (d.d_value_scale != nullptr) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = accumulator_row() + 8 * half;
            Sum dot = 0;
#pragma unroll
            for (int j = 0; j < width / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    dot += d_v[j][2 * half + e] *
                           static_cast<Sum>(own_v[row * Rows16::stride + 8 * j + accumulator_column() + e]);
            dot = row_reduce(dot, Plus());
            if (lane_id() % 4 == 0 && first + row < a.keys)
                d.d_value_scale[(static_cast<Index>(block.b) * a.heads() + block.h) * a.keys + first + row] = dot;
        }
    }
    Rows16::store(own_k, d_k, a.scale, a.scale, block.rows(a, a.k.with(d.d_k)), first, a.keys, a.dim_head, a.vectors);
    Rows16::store(own_v, d_v, value_scale[0], value_scale[1], block.rows(a, a.v.with(d.d_v)), first, a.keys, a.dim_head,
                  a.vectors);
}

/// Assigns d.d_q, d.d_k, d.d_v and, unless it is null, d.d_value_scale.
template <typename T>
void run_attention_backward(const Cuda& policy, const Attention<T>& a, const AttentionGradients<T>& d) {
    Tensor<accumulate_t<T>, Cuda, dynamic> out_dot(policy, {static_cast<Index>(a.batch) * a.heads() * a.queries});
    with_arithmetic<T>(policy, [&]<typename Arithmetic>() {
        with_width(a.dim_head, [&]<int width>() {
            using Shape = BackwardShape<Arithmetic, width>;
            const Index query_tiles = divide_up(a.queries, Shape::own), key_tiles = divide_up(a.keys, Shape::own);
            launch(policy, "attention_query_gradient", attention_query_gradient<Arithmetic, width>,
                   grid(query_tiles * a.batch * a.heads()), Shape::threads, sizeof(typename Shape::Shared), a, d,
                   static_cast<int>(query_tiles), out_dot.data());
            launch(policy, "attention_key_gradient", attention_key_gradient<Arithmetic, width>,
                   grid(key_tiles * a.batch * a.heads()), Shape::threads, sizeof(typename Shape::Shared), a, d,
                   static_cast<int>(key_tiles), out_dot.data());
        });
    });
}

}  // namespace colt5::cuda
