// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention_tile.cuh>

namespace colt5::cuda {

/// The sizes of the forward kernel: each warp has 16 queries, and blocks of keys pass through shared memory. A window
/// of keys comes in one go where there is room, behind the computation of other blocks of the multiprocessor; more keys
/// than that come in turn, one stage ahead.
template <typename Arithmetic_, int width_, bool window>
struct ForwardShape {
    using Arithmetic = Arithmetic_;
    using T = typename Arithmetic::Scalar;
    using Sum = typename Arithmetic::Sum;
    using Tile = cuda::Tile<Arithmetic, width_>;
    static constexpr int width = width_, row_bytes = width * sizeof(T);
    static constexpr int warps = row_bytes > 512 ? 2 : row_bytes <= 128 && window ? 8 : 4;
    static constexpr int queries = 16 * warps, threads = warp_size * warps;
    static constexpr int in_turn = row_bytes <= 256 ? 64 : row_bytes <= 512 ? 32 : 16;
    static constexpr int keys = window ? window_rows<T>(queries, queries, Tile::stride) : in_turn;
    static constexpr int stages = window || row_bytes > 256 ? 1 : 2;
    static constexpr int chunk = window ? 3 : keys / 16;  // groups of 16 keys per step of the softmax
    static constexpr int blocks_per_multiprocessor = row_bytes > 256 ? 1 : row_bytes > 128 || window ? 2 : 4;

    struct Stage {
        T k[keys * Tile::stride], v[keys * Tile::stride];
        Sum value_scale[keys];
        bool visible[keys];  // filled if there is a mask, or if keys end in this block
    };
    struct Shared {
        T q[queries * Tile::stride];
        Stage stage[stages];
    };
};

/// Online softmax over the blocks of keys that a tile of queries sees; see Attention.
template <typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks_per_multiprocessor)
    attention_forward(const Attention<typename Shape::T> a, typename Shape::T* out, typename Shape::Sum* log_sum_exp) {
    using T = typename Shape::T;
    using Sum = typename Shape::Sum;
    using Arithmetic = typename Shape::Arithmetic;
    using Tile = typename Shape::Tile;
    static_assert(sizeof(typename Shape::Shared) <= shared_bytes);
    constexpr int width = Shape::width;
    constexpr Sum infinity = std::numeric_limits<Sum>::infinity();
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);

    const AttentionBlock<T> block(a, Shape::queries);
    const Rows<const T> k = block.rows(a, a.k), v = block.rows(a, a.v);
    const Sight sight(a.first + block.first, Shape::queries, a.reach, a.keys);
    const int key_blocks = (sight.end - sight.begin + Shape::keys - 1) / Shape::keys;
    const auto is_incomplete = [&](int i) {
        return a.mask != nullptr || sight.begin + (i + 1) * Shape::keys > sight.end;
    };
    const auto load_keys = [&](int i) {
        auto& stage = shared.stage[i % Shape::stages];
        const int first = sight.begin + i * Shape::keys, rows = ::min(Shape::keys, (sight.end - first + 15) / 16 * 16);
        Tile::template load<Shape::threads>(stage.k, k, first, rows, sight.end, a.dim_head, a.vectors);
        Tile::template load<Shape::threads>(stage.v, v, first, rows, sight.end, a.dim_head, a.vectors);
        const Index keys = block.of_keys(a) + first;
        if (is_incomplete(i))
            for (int row = static_cast<int>(threadIdx.x); row < rows; row += Shape::threads)
                stage.visible[row] = first + row < sight.end && (a.mask == nullptr || a.mask[keys + row]);
        if (a.value_scale != nullptr)
            for (int row = static_cast<int>(threadIdx.x); row < rows; row += Shape::threads)
                stage.value_scale[row] = first + row < sight.end ? a.value_scale[keys + row] : Sum(0);
        end_copy_group();
    };

    Tile::template load<Shape::threads>(shared.q, block.rows(a, a.q), block.first, Shape::queries, a.queries,
                                        a.dim_head, a.vectors);
    load_keys(0);
    wait_for_copies<0>();
    __syncthreads();

    const int first = block.first + 16 * warp_id(), position = a.first + first;
    T* const own = shared.q + (first - block.first) * Tile::stride;
    const Left<Arithmetic, width, true> q(own);
    const Sum to_log2 = a.scale * static_cast<Sum>(log2_e);
    Sum largest[2] = {-infinity, -infinity}, total[2] = {}, sum[width / 8][4] = {};

    pipeline<Shape::stages>(key_blocks, load_keys, [&](int i) {
        const auto& stage = shared.stage[i % Shape::stages];
        const int block_first = sight.begin + i * Shape::keys;
        const bool incomplete = is_incomplete(i);
        const auto attend = [&](auto count, int group) {
            constexpr int groups = decltype(count)::value;
            Sum score[groups][2][4];
#pragma unroll
            for (int c = 0; c < groups; ++c)
                multiply_transposed(score[c], q, stage.k + 16 * (group + c) * Tile::stride);
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                const int columns = block_first + 16 * (group + c);
                if (!sees_all(position, columns, a.reach))
                    for_each_entry([&](int j, int e, int row, int column) {
                        if (is_far(columns + column - position - row, a.reach)) score[c][j][e] = -infinity;
                    });
                if (incomplete)
                    for_each_entry([&](int j, int e, int, int column) {
                        if (!stage.visible[16 * (group + c) + column]) score[c][j][e] = -infinity;
                    });
            }
            Sum top[2] = {largest[0], largest[1]}, shift[2];
#pragma unroll
            for (int c = 0; c < groups; ++c)
                for_each_entry([&](int j, int e, int, int) { top[e / 2] = ::max(top[e / 2], score[c][j][e]); });
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
            for (int c = 0; c < groups; ++c)
                for_each_entry([&](int j, int e, int, int) {
                    score[c][j][e] = power_of_two(score[c][j][e] * to_log2 - shift[e / 2]);
                    total[e / 2] += score[c][j][e];
                });
            if (a.value_scale != nullptr)
#pragma unroll
                for (int c = 0; c < groups; ++c)
                    for_each_entry([&](int j, int e, int, int column) {
                        score[c][j][e] *= stage.value_scale[16 * (group + c) + column];
                    });
#pragma unroll
            for (int c = 0; c < groups; ++c)
                Arithmetic::template multiply<width>(sum, score[c], stage.v + 16 * (group + c) * Tile::stride);
        };
        for_each_chunk<Shape::chunk>(Groups(position, block_first, Shape::keys, sight.end, a.reach), attend);
    });

    Sum factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Sum all = row_reduce(total[half], Plus());
        factor[half] = all > Sum(0) ? reciprocal(all) : Sum(0);
        const int query = first + accumulator_row() + 8 * half;
        if (log_sum_exp != nullptr && lane_id() % 4 == 0 && query < a.queries)
            log_sum_exp[block.of_queries(a) + query] = largest[half] * a.scale + ::log(all);
    }
    Tile::store(own, sum, factor[0], factor[1], block.rows(a, a.out.with(out)), first, a.queries, a.dim_head,
                a.vectors);
}

/// Assigns `out`, which has the layout of a.out, and log_sum_exp (batch, heads, queries) unless it is null.
template <bool window, typename T>
void run_attention_forward(const Cuda& policy, const Attention<T>& a, T* out, accumulate_t<T>* log_sum_exp) {
    with_arithmetic<T>(policy, [&]<typename Arithmetic>() {
        with_width(a.dim_head, [&]<int width>() {
            using Shape = ForwardShape<Arithmetic, width, window && Arithmetic::has_tensor_cores>;
            launch(policy, "attention_forward", attention_forward<Shape>, attention_grid(a, a.queries, Shape::queries),
                   Shape::threads, sizeof(typename Shape::Shared), a, out, log_sum_exp);
        });
    });
}

}  // namespace colt5::cuda
