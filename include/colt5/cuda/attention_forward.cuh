// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention_tile.cuh>

namespace colt5::cuda {

/// The sizes of the forward kernel: each warp has 16 queries, and blocks of keys pass through shared memory.
template <typename Arithmetic, int width>
struct ForwardShape {
    static constexpr int row_bytes = width * sizeof(typename Arithmetic::Scalar);
    static constexpr int warps = row_bytes <= 512 ? 4 : 2;
    static constexpr int queries = 16 * warps, threads = warp_size * warps;
    static constexpr int keys = row_bytes <= 256 ? 64 : row_bytes <= 512 ? 32 : 16;
    static constexpr int stages = row_bytes <= 256 ? 2 : 1;
    static constexpr int blocks_per_multiprocessor = row_bytes <= 128 ? 4 : row_bytes <= 256 ? 2 : 1;
    using T = typename Arithmetic::Scalar;

    struct Stage {
        T k[keys * Tile<Arithmetic, width>::stride], v[keys * Tile<Arithmetic, width>::stride];
        accumulate_t<T> value_scale[keys];
        bool visible[keys];
    };
    struct Shared {
        T q[queries * Tile<Arithmetic, width>::stride];
        Stage stage[stages];
    };
};

/// Online softmax over the blocks of keys that a tile of queries sees; see Attention.
template <typename Arithmetic, int width>
__global__ void __launch_bounds__(ForwardShape<Arithmetic, width>::threads,
                                  ForwardShape<Arithmetic, width>::blocks_per_multiprocessor)
    attention_forward(const Attention<typename Arithmetic::Scalar> a, int tiles, typename Arithmetic::Scalar* out,
                      typename Arithmetic::Sum* log_sum_exp) {
    using T = typename Arithmetic::Scalar;
    using Sum = typename Arithmetic::Sum;
    using Shape = ForwardShape<Arithmetic, width>;
    using Rows16 = Tile<Arithmetic, width>;
    constexpr Sum infinity = std::numeric_limits<Sum>::infinity();
    constexpr int groups = Shape::keys / 16;
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);

    const AttentionBlock<T> block(a, Shape::queries, tiles);
    const Rows<const T> k = block.rows(a, a.k), v = block.rows(a, a.v);
    const Sight sight(block.first, Shape::queries, a.reach, a.keys);
    const int key_blocks = (sight.end - sight.begin + Shape::keys - 1) / Shape::keys;
    const auto load_keys = [&](int i) {
        auto& stage = shared.stage[i % Shape::stages];
        const int first = sight.begin + i * Shape::keys;
        Rows16::template load<Shape::keys, Shape::threads>(stage.k, k, first, sight.end, a.dim_head, a.vectors);
        Rows16::template load<Shape::keys, Shape::threads>(stage.v, v, first, sight.end, a.dim_head, a.vectors);
        const int row = static_cast<int>(threadIdx.x);
        if (row < Shape::keys) {
            const bool real = first + row < sight.end;
            const Index at = block.of_keys(a) + first + row;
            stage.visible[row] = real && (a.mask == nullptr || a.mask[at]);
            if (a.value_scale != nullptr) stage.value_scale[row] = real ? a.value_scale[at] : Sum(0);
        }
        end_copy_group();
    };

    Rows16::template load<Shape::queries, Shape::threads>(shared.q, block.rows(a, a.q), block.first, a.queries,
                                                          a.dim_head, a.vectors);
    load_keys(0);
    wait_for_copies<0>();
    __syncthreads();

    const int warp = warp_id(), first = block.first + 16 * warp;
    T* const own = shared.q + 16 * warp * Rows16::stride;
    const Left<Arithmetic, width, true> q(own);
    const Sum to_log2 = a.scale * static_cast<Sum>(log2_e);
    Sum largest[2] = {-infinity, -infinity}, total[2] = {0, 0};
    Sum sum[width / 8][4] = {};

    pipeline<Shape::stages>(key_blocks, load_keys, [&](int i) {
        const auto& stage = shared.stage[i % Shape::stages];
        const int block_first = sight.begin + i * Shape::keys;
        const bool incomplete = a.mask != nullptr || block_first + Shape::keys > sight.end;
        const auto visible = [&](int group) {
            return Overlap(first, block_first + 16 * group, a.reach).any && block_first + 16 * group < sight.end;
        };

        Sum score[groups][2][4];
        Sum top[2] = {largest[0], largest[1]};
#pragma unroll
        for (int group = 0; group < groups; ++group) {
            if (!visible(group)) continue;
            const int columns = block_first + 16 * group;
            multiply_transposed(score[group], q, stage.k + 16 * group * Rows16::stride);
            if (incomplete || !Overlap(first, columns, a.reach).all) {
                const int offset = columns + accumulator_column() - first - accumulator_row();  // key − query
#pragma unroll
                for (int j = 0; j < 2; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        if (abs(offset + 8 * j + e % 2 - e / 2 * 8) > a.reach ||
                            !stage.visible[16 * group + accumulator_column() + 8 * j + e % 2])
                            score[group][j][e] = -infinity;
            }
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) top[e / 2] = max(top[e / 2], score[group][j][e]);
        }
        Sum shift[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            top[half] = row_reduce(top[half], Greater());
            shift[half] = top[half] == -infinity ? Sum(0) : top[half] * to_log2;
            const Sum shrink = power_of_two(largest[half] * to_log2 - shift[half]);
            largest[half] = top[half];
            total[half] *= shrink;
#pragma unroll
            for (int j = 0; j < width / 8; ++j) {
                sum[j][2 * half] *= shrink;
                sum[j][2 * half + 1] *= shrink;
            }
        }
#pragma unroll
        for (int group = 0; group < groups; ++group) {
            if (!visible(group)) continue;
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    Sum& p = score[group][j][e];
                    p = power_of_two(p * to_log2 - shift[e / 2]);
                    total[e / 2] += p;
                    if (a.value_scale != nullptr)
                        p *= stage.value_scale[16 * group + accumulator_column() + 8 * j + e % 2];
                }
            Arithmetic::template multiply<width>(sum, score[group], stage.v + 16 * group * Rows16::stride);
        }
    });

    Sum factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        total[half] = row_reduce(total[half], Plus());
        factor[half] = total[half] > Sum(0) ? Sum(1) / total[half] : Sum(0);
        const int query = first + accumulator_row() + 8 * half;
        if (log_sum_exp != nullptr && lane_id() % 4 == 0 && query < a.queries)
            log_sum_exp[block.of_queries(a) + query] = largest[half] * a.scale + log(total[half]);
    }
    Rows16::store(own, sum, factor[0], factor[1], block.rows(a, a.out.with(out)), first, a.queries, a.dim_head,
                  a.vectors);
}

/// Assigns `out`, which has the layout of a.out, and log_sum_exp (batch, heads, queries) unless it is null.
template <typename T>
void run_attention_forward(const Cuda& policy, const Attention<T>& a, T* out, accumulate_t<T>* log_sum_exp) {
    with_arithmetic<T>(policy, [&]<typename Arithmetic>() {
        with_width(a.dim_head, [&]<int width>() {
            using Shape = ForwardShape<Arithmetic, width>;
            const Index tiles = divide_up(a.queries, Shape::queries);
            launch(policy, "attention_forward", attention_forward<Arithmetic, width>, grid(tiles * a.batch * a.heads()),
                   Shape::threads, sizeof(typename Shape::Shared), a, static_cast<int>(tiles), out, log_sum_exp);
        });
    });
}

}  // namespace colt5::cuda
