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
    Heads<T> d_q, d_k, d_v;  // assigned
    Sum* d_value_scale;      // (batch, heads, keys) or null: the share of each head
};

/// The sizes of the kernel for d_q (one sum) or for d_k and d_v (two): each warp owns 16 queries or keys, and blocks of
/// the others pass through shared memory, a window in one go where there is room, else in turn.
template <typename Arithmetic_, int width_, bool window, int sums>
struct BackwardShape {
    using Arithmetic = Arithmetic_;
    using T = typename Arithmetic::Scalar;
    using Sum = typename Arithmetic::Sum;
    using Tile = cuda::Tile<Arithmetic, width_>;
    static constexpr int width = width_, row_bytes = width * sizeof(T);
    static constexpr int warps = row_bytes <= 512 ? 4 : 2;
    static constexpr int own = 16 * warps, threads = warp_size * warps;
    static constexpr int in_turn = row_bytes <= 128 ? 64 : row_bytes <= 256 ? 32 : 16;
    static constexpr int passing = window ? window_rows<T>(own, 2 * own, Tile::stride) : in_turn;
    static constexpr int stages = window || row_bytes > 256 ? 1 : 2;

    /// Registers of a thread for both left sides and for the sums.
    static constexpr int registers = row_bytes / 4 + sums * width / 2 * static_cast<int>(sizeof(Sum)) / 4;
    static constexpr bool left_is_resident = registers <= 160;
    static constexpr int blocks_per_multiprocessor = registers <= 104 ? 3 : registers <= 128 ? 2 : 1;
    /// Groups of 16 passing rows at a time, for independent work behind the latency of each product.
    static constexpr int chunk = window && sums == 2 && registers <= 128 ? 2 : 1;

    struct Stage {
        T first[passing * Tile::stride], second[passing * Tile::stride];
        Sum of_row[2][passing];
        bool visible[passing];  // filled if there is a mask, or if keys end in this block
    };
    struct Shared {
        T first[own * Tile::stride], second[own * Tile::stride];
        Sum of_row[own];
        Stage stage[stages];
    };
};

/// out · d_out of 16 rows from `first` on, to `dots` in shared memory and to `to`: two lanes a row.
template <typename T, typename Sum>
__device__ void dot_rows(Sum* dots, Sum* to, const Rows<const T>& outs, const Rows<const T>& d_outs, int first,
                         const Attention<T>& a) {
    constexpr int lanes = 16 / sizeof(T);
    struct alignas(16) Vector {
        T values[lanes];
    };
    const int row = lane_id() / 2, half = lane_id() % 2;
    Sum dot = 0;
    if (first + row < a.queries) {
        const T* const out = outs[first + row];
        const T* const d_out = d_outs[first + row];
        if (a.vectors) {
#pragma unroll 4
            for (int c = half * lanes; c < a.dim_head; c += 2 * lanes) {
                const Vector x = *reinterpret_cast<const Vector*>(out + c);
                const Vector y = *reinterpret_cast<const Vector*>(d_out + c);
#pragma unroll
                for (int e = 0; e < lanes; ++e) dot += static_cast<Sum>(x.values[e]) * static_cast<Sum>(y.values[e]);
            }
        } else {
            for (int c = half; c < a.dim_head; c += 2) dot += static_cast<Sum>(out[c]) * static_cast<Sum>(d_out[c]);
        }
    }
    dot += __shfl_xor_sync(0xffffffffu, dot, 1);
    if (half != 0) return;
    dots[row] = dot;
    if (first + row < a.queries) to[first + row] = dot;
}

/// Rows that saw no key get weights exp(s − ∞) = 0.
template <typename Sum>
__device__ Sum shift_of(Sum log_sum_exp) {
    constexpr Sum infinity = std::numeric_limits<Sum>::infinity();
    return log_sum_exp == -infinity ? infinity : log_sum_exp * static_cast<Sum>(log2_e);
}

/// d_q and D, by tiles of queries.
template <typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks_per_multiprocessor)
    attention_query_gradient(const Attention<typename Shape::T> a, const AttentionGradients<typename Shape::T> d,
                             typename Shape::Sum* out_dots) {
    using T = typename Shape::T;
    using Sum = typename Shape::Sum;
    using Arithmetic = typename Shape::Arithmetic;
    using Tile = typename Shape::Tile;
    static_assert(sizeof(typename Shape::Shared) <= shared_bytes);
    constexpr int width = Shape::width;
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);

    const AttentionBlock<T> block(a, Shape::own);
    const Rows<const T> k = block.rows(a, a.k), v = block.rows(a, a.v);
    const Sight sight(a.first + block.first, Shape::own, a.reach, a.keys);
    const int key_blocks = (sight.end - sight.begin + Shape::passing - 1) / Shape::passing;
    const auto is_incomplete = [&](int i) {
        return a.mask != nullptr || sight.begin + (i + 1) * Shape::passing > sight.end;
    };
    const auto load_keys = [&](int i) {
        auto& stage = shared.stage[i % Shape::stages];
        const int first = sight.begin + i * Shape::passing;
        const int rows = ::min(Shape::passing, (sight.end - first + 15) / 16 * 16);
        Tile::template load<Shape::threads>(stage.first, k, first, rows, sight.end, a.dim_head, a.vectors);
        Tile::template load<Shape::threads>(stage.second, v, first, rows, sight.end, a.dim_head, a.vectors);
        const Index keys = block.of_keys(a) + first;
        if (is_incomplete(i))
            for (int row = static_cast<int>(threadIdx.x); row < rows; row += Shape::threads)
                stage.visible[row] = first + row < sight.end && (a.mask == nullptr || a.mask[keys + row]);
        if (a.value_scale != nullptr)
            for (int row = static_cast<int>(threadIdx.x); row < rows; row += Shape::threads)
                stage.of_row[0][row] = first + row < sight.end ? a.value_scale[keys + row] : Sum(0);
        end_copy_group();
    };
    Tile::template load<Shape::threads>(shared.first, block.rows(a, a.q), block.first, Shape::own, a.queries,
                                        a.dim_head, a.vectors);
    Tile::template load<Shape::threads>(shared.second, block.rows(a, a.out.with(d.d_out)), block.first, Shape::own,
                                        a.queries, a.dim_head, a.vectors);
    load_keys(0);

    const int first = block.first + 16 * warp_id(), position = a.first + first, own_row = first - block.first;
    const Sum to_log2 = a.scale * static_cast<Sum>(log2_e);
    Sum shift[2], out_dot[2];
    dot_rows(shared.of_row + own_row, out_dots + block.of_queries(a), block.rows(a, a.out.with(d.out)),
             block.rows(a, a.out.with(d.d_out)), first, a);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int query = first + accumulator_row() + 8 * half;
        shift[half] = shift_of(query < a.queries ? d.log_sum_exp[block.of_queries(a) + query]
                                                 : -std::numeric_limits<Sum>::infinity());
    }
    wait_for_copies<0>();
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) out_dot[half] = shared.of_row[own_row + accumulator_row() + 8 * half];

    T* const own = shared.first + own_row * Tile::stride;
    const Left<Arithmetic, width, Shape::left_is_resident> q(own), d_out(shared.second + own_row * Tile::stride);
    Sum sum[width / 8][4] = {};

    pipeline<Shape::stages>(key_blocks, load_keys, [&](int i) {
        const auto& stage = shared.stage[i % Shape::stages];
        const int block_first = sight.begin + i * Shape::passing;
        const bool incomplete = is_incomplete(i);
        const auto add = [&](auto count, int group) {
            constexpr int groups = decltype(count)::value;
            Sum p[groups][2][4], d_p[groups][2][4];
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                multiply_transposed(p[c], q, stage.first + 16 * (group + c) * Tile::stride);
                multiply_transposed(d_p[c], d_out, stage.second + 16 * (group + c) * Tile::stride);
            }
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                const int columns = block_first + 16 * (group + c);
                for_each_entry(
                    [&](int j, int e, int, int) { p[c][j][e] = power_of_two(p[c][j][e] * to_log2 - shift[e / 2]); });
                if (!sees_all(position, columns, a.reach))
                    for_each_entry([&](int j, int e, int row, int column) {
                        if (is_far(columns + column - position - row, a.reach)) p[c][j][e] = 0;
                    });
                if (incomplete)
                    for_each_entry([&](int j, int e, int, int column) {
                        if (!stage.visible[16 * (group + c) + column]) p[c][j][e] = 0;
                    });
                if (a.value_scale != nullptr)
                    for_each_entry([&](int j, int e, int, int column) {
                        d_p[c][j][e] *= stage.of_row[0][16 * (group + c) + column];
                    });
                for_each_entry(
                    [&](int j, int e, int, int) { d_p[c][j][e] = p[c][j][e] * (d_p[c][j][e] - out_dot[e / 2]); });
            }
#pragma unroll
            for (int c = 0; c < groups; ++c)
                Arithmetic::template multiply<width>(sum, d_p[c], stage.first + 16 * (group + c) * Tile::stride);
        };
        for_each_chunk<Shape::chunk>(Groups(position, block_first, Shape::passing, sight.end, a.reach), add);
    });
    Tile::store(own, sum, a.scale, a.scale, block.rows(a, d.d_q), first, a.queries, a.dim_head, a.vectors);
}

/// d_k, d_v and each head's share of d_value_scale, by tiles of keys.
template <typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks_per_multiprocessor)
    attention_key_gradient(const Attention<typename Shape::T> a, const AttentionGradients<typename Shape::T> d,
                           const typename Shape::Sum* out_dots) {
    using T = typename Shape::T;
    using Sum = typename Shape::Sum;
    using Arithmetic = typename Shape::Arithmetic;
    using Tile = typename Shape::Tile;
    static_assert(sizeof(typename Shape::Shared) <= shared_bytes);
    constexpr int width = Shape::width;
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);

    const AttentionBlock<T> block(a, Shape::own);
    const Rows<const T> queries = block.rows(a, a.q), d_outs = block.rows(a, a.out.with(d.d_out));
    const Sight sight(block.first - a.first, Shape::own, a.reach, a.queries);
    const int query_blocks = (sight.end - sight.begin + Shape::passing - 1) / Shape::passing;
    const auto load_queries = [&](int i) {
        auto& stage = shared.stage[i % Shape::stages];
        const int first = sight.begin + i * Shape::passing;
        const int rows = ::min(Shape::passing, (sight.end - first + 15) / 16 * 16);
        Tile::template load<Shape::threads>(stage.first, queries, first, rows, sight.end, a.dim_head, a.vectors);
        Tile::template load<Shape::threads>(stage.second, d_outs, first, rows, sight.end, a.dim_head, a.vectors);
        const Index at = block.of_queries(a) + first;
        for (int row = static_cast<int>(threadIdx.x); row < rows; row += Shape::threads) {
            const bool real = first + row < sight.end;
            stage.of_row[0][row] = shift_of(real ? d.log_sum_exp[at + row] : -std::numeric_limits<Sum>::infinity());
            stage.of_row[1][row] = real ? out_dots[at + row] : Sum(0);
        }
        end_copy_group();
    };
    Tile::template load<Shape::threads>(shared.first, block.rows(a, a.k), block.first, Shape::own, a.keys, a.dim_head,
                                        a.vectors);
    Tile::template load<Shape::threads>(shared.second, block.rows(a, a.v), block.first, Shape::own, a.keys, a.dim_head,
                                        a.vectors);
    load_queries(0);
    wait_for_copies<0>();
    __syncthreads();

    const int warp = warp_id(), first = block.first + 16 * warp;
    const int position = first - a.first;  // among the queries
    T* const own_k = shared.first + 16 * warp * Tile::stride;
    T* const own_v = shared.second + 16 * warp * Tile::stride;
    const Left<Arithmetic, width, Shape::left_is_resident> k(own_k), v(own_v);
    const Sum to_log2 = a.scale * static_cast<Sum>(log2_e);
    Sum value_scale[2] = {1, 1};
    if (a.value_scale != nullptr)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int key = first + accumulator_row() + 8 * half;
            if (key < a.keys) value_scale[half] = a.value_scale[block.of_keys(a) + key];
        }
    Sum d_k[width / 8][4] = {}, d_v[width / 8][4] = {};

    pipeline<Shape::stages>(query_blocks, load_queries, [&](int i) {
        const auto& stage = shared.stage[i % Shape::stages];
        const int block_first = sight.begin + i * Shape::passing;
        const auto add = [&](auto count, int group) {
            constexpr int groups = decltype(count)::value;
            Sum p[groups][2][4], d_p[groups][2][4];
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                multiply_transposed(p[c], k, stage.first + 16 * (group + c) * Tile::stride);
                multiply_transposed(d_p[c], v, stage.second + 16 * (group + c) * Tile::stride);
            }
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                const int columns = block_first + 16 * (group + c);
                for_each_entry([&](int j, int e, int, int column) {
                    p[c][j][e] = power_of_two(p[c][j][e] * to_log2 - stage.of_row[0][16 * (group + c) + column]);
                });
                if (!sees_all(position, columns, a.reach))
                    for_each_entry([&](int j, int e, int row, int column) {
                        if (is_far(columns + column - position - row, a.reach)) p[c][j][e] = 0;
                    });
                for_each_entry([&](int j, int e, int, int column) {
                    const Sum out_dot = stage.of_row[1][16 * (group + c) + column];
                    d_p[c][j][e] = p[c][j][e] * (d_p[c][j][e] * value_scale[e / 2] - out_dot);
                });
            }
#pragma unroll
            for (int c = 0; c < groups; ++c) {
                Arithmetic::template multiply<width>(d_v, p[c], stage.second + 16 * (group + c) * Tile::stride);
                Arithmetic::template multiply<width>(d_k, d_p[c], stage.first + 16 * (group + c) * Tile::stride);
            }
        };
        for_each_chunk<Shape::chunk>(Groups(position, block_first, Shape::passing, sight.end, a.reach), add);
    });

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = accumulator_row() + 8 * half;
        // Rows do not mix, so that what a masked key collected is dropped only here.
        if (first + row < a.keys && a.mask != nullptr && !a.mask[block.of_keys(a) + first + row])
#pragma unroll
            for (int j = 0; j < width / 8; ++j)
                d_k[j][2 * half] = d_k[j][2 * half + 1] = d_v[j][2 * half] = d_v[j][2 * half + 1] = 0;
        if (d.d_value_scale == nullptr) continue;
        Sum dot = 0;
#pragma unroll
        for (int j = 0; j < width / 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                dot += d_v[j][2 * half + e] *
                       static_cast<Sum>(own_v[row * Tile::stride + 8 * j + accumulator_column() + e]);
        dot = row_reduce(dot, Plus());
        if (lane_id() % 4 == 0 && first + row < a.keys)
            d.d_value_scale[(static_cast<Index>(block.b) * a.heads() + block.h) * a.keys + first + row] = dot;
    }
    Tile::store(own_k, d_k, a.scale, a.scale, block.rows(a, d.d_k), first, a.keys, a.dim_head, a.vectors);
    Tile::store(own_v, d_v, value_scale[0], value_scale[1], block.rows(a, d.d_v), first, a.keys, a.dim_head, a.vectors);
}

/// Assigns what d.d_q, d.d_k, d.d_v and, unless it is null, d.d_value_scale point to.
template <bool window, typename T>
void run_attention_backward(const Cuda& policy, const Attention<T>& a, const AttentionGradients<T>& d) {
    Tensor<accumulate_t<T>, Cuda, dynamic> out_dot(policy, {static_cast<Index>(a.batch) * a.heads() * a.queries});
    with_arithmetic<T>(policy, [&]<typename Arithmetic>() {
        with_width(a.dim_head, [&]<int width>() {
            constexpr bool at_once = window && Arithmetic::has_tensor_cores;
            using ForQueries = BackwardShape<Arithmetic, width, at_once, 1>;
            using ForKeys = BackwardShape<Arithmetic, width, at_once, 2>;
            launch(policy, "attention_query_gradient", attention_query_gradient<ForQueries>,
                   attention_grid(a, a.queries, ForQueries::own), ForQueries::threads,
                   sizeof(typename ForQueries::Shared), a, d, out_dot.data());
            launch(policy, "attention_key_gradient", attention_key_gradient<ForKeys>,
                   attention_grid(a, a.keys, ForKeys::own), ForKeys::threads, sizeof(typename ForKeys::Shared), a, d,
                   out_dot.data());
        });
    });
}

}  // namespace colt5::cuda
