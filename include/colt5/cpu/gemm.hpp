// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <cstring>

#include <colt5/core/tensor.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/simd.hpp>

#if defined(COLT5_USE_BLAS)
#include <colt5/cpu/blas.hpp>
#endif

/// Matrix products, on the calling thread unless a comment says otherwise. All matrices are row-major; `lda`, `ldb`,
/// `ldc` are the distances between stored rows.
///
/// Every entry of a result is one chain of fused multiply-adds for each `GemmTile::depth` steps along k, whatever its
/// place and whatever is computed beside it: the same row gives the same bits in any panel. (With COLT5_USE_BLAS
/// the BLAS computes the products, and only its guarantees hold.)
///
/// Why not Eigen's kernel: this one needs no packed copy of the left side of a · b, writes results instead of adding to
/// zeros, and keeps 24 sums in the 32 registers of AVX-512 and NEON where Eigen 3.4 keeps 12 (bench/sgemm.cpp
/// compares).
namespace colt5::cpu {

enum class Op { none, transpose };

/// The block of a result that stays in registers: rows × columns sums, beside one row of b and one entry of a.
template <typename T>
struct GemmTile {
#if defined(__AVX512F__) || defined(__aarch64__)
    static constexpr int vectors = 4;  // 6 · 4 sums, 4 of b and 1 of a: 29 of 32 registers
#else
    static constexpr int vectors = 2;  // 6 · 2 sums, 2 of b and 1 of a: 15 of 16 registers
#endif
    static constexpr int rows = tile_rows;
    static constexpr Index columns = vectors * lanes<T>;
    /// Steps along k between two loads and stores of c. The rows of b for one tile, depth × columns, stay in L1 or L2.
    static constexpr Index depth = 512;
};

/// What is added to a product: a row to all rows, a matrix, which may be the result itself, both or nothing.
template <typename T>
struct Addend {
    const T* row = nullptr;
    const T* matrix = nullptr;
    Index stride = 0;

    Addend part(Index i, Index j) const {
        return {row == nullptr ? nullptr : row + j, matrix == nullptr ? nullptr : matrix + i * stride + j, stride};
    }
};

/// a (m, depth): entry (i, k) of a tile lies at i · row_stride + k · depth_stride; the tile whose first row is `row`
/// begins at row · tile_stride.
template <typename T>
struct LeftSide {
    const T* data;
    Index row_stride, depth_stride, tile_stride;

    LeftSide from_row(Index row) const { return {data + row * tile_stride, row_stride, depth_stride, tile_stride}; }
};

namespace detail {

/// sum += a · b in registers. Entries of a row of a are depth_stride apart, rows of b are ldb apart.
template <typename T, std::size_t rows, std::size_t vectors>
void accumulate(Batch<T> (&sum)[rows][vectors], Index depth, const std::array<const T*, rows>& row, Index depth_stride,
                const T* b, Index ldb) {
    Index at = 0;
    for (Index k = 0; k < depth; ++k) {
        Batch<T> right[vectors];
        unroll<static_cast<int>(vectors)>([&](auto v) { right[v] = load(b + v * lanes<T>); });
        unroll<static_cast<int>(rows)>([&](auto i) {
            const Batch<T> left(row[i][at]);
            unroll<static_cast<int>(vectors)>([&](auto v) { sum[i][v] = xsimd::fma(left, right[v], sum[i][v]); });
        });
        b += ldb;
        at += depth_stride;
    }
}

/// c = alpha · a · b + add for one tile; b is packed, (depth, GemmTile::columns). Of the tile only `rows` × `columns`
/// are written.
template <typename T>
[[gnu::noinline, gnu::flatten]] void multiply_tile(Index depth, T alpha, const LeftSide<T>& a, const T* b,
                                                   const Addend<T>& add, T* c, Index ldc, Index rows, Index columns) {
    using Tile = GemmTile<T>;
    constexpr int vectors = Tile::vectors;
    const bool whole = rows == Tile::rows && columns >= Tile::columns;
    std::array<const T*, Tile::rows> row;
    unroll<Tile::rows>([&](auto i) {
        row[i] = a.data + std::min<Index>(i, rows - 1) * a.row_stride;
        if (whole && add.matrix != nullptr) __builtin_prefetch(add.matrix + i * add.stride);
        if (whole) __builtin_prefetch(c + i * ldc, 1);
    });
    Batch<T> sum[Tile::rows][std::size_t{vectors}];
    unroll<Tile::rows, vectors>([&](auto i, auto v) { sum[i][v] = Batch<T>(T(0)); });
    accumulate(sum, depth, row, a.depth_stride, b, Tile::columns);
    const Batch<T> scale(alpha);
    if (whole) {
        unroll<Tile::rows, vectors>([&](auto i, auto v) {
            const Index j = v * lanes<T>;
            Batch<T> result = sum[i][v] * scale;
            if (add.row != nullptr) result += load(add.row + j);
            if (add.matrix != nullptr) result += load(add.matrix + i * add.stride + j);
            store(c + i * ldc + j, result);
        });
        return;
    }
    // The rarer case is a loop that reads the sums from memory: less code than one that is unrolled.
    alignas(64) T sums[std::size_t{Tile::rows * Tile::columns}];
    unroll<Tile::rows, vectors>([&](auto i, auto v) { store(sums + i * Tile::columns + v * lanes<T>, sum[i][v]); });
    for (Index i = 0; i < rows; ++i)
        for_each_batch<T>(std::min(columns, Tile::columns), [&](Index j, Index width) {
            Batch<T> result = load(sums + i * Tile::columns + j) * scale;
            if (add.row != nullptr) result += load(add.row + j, width);
            if (add.matrix != nullptr) result += load(add.matrix + i * add.stride + j, width);
            store(c + i * ldc + j, result, width);
        });
}

/// Rows k … k + depth of op(b) from column `first` on as (depth, GemmTile::columns), with zeros behind the last column.
template <Op op, typename T>
void pack_strip(const T* b, Index ldb, Index k, Index depth, Index first, Index n, T* strip) {
    constexpr Index width = GemmTile<T>::columns;
    const Index count = std::min(width, n - first);
    if (count < width) std::fill_n(strip, depth * width, T(0));
    if constexpr (op == Op::none) {
        const T* const from = b + k * ldb + first;
        if (count == width) {
            for (Index i = 0; i < depth; ++i)
                unroll<GemmTile<T>::vectors>(
                    [&](auto v) { store(strip + i * width + v * lanes<T>, load(from + i * ldb + v * lanes<T>)); });
        } else {
            for (Index i = 0; i < depth; ++i) std::copy_n(from + i * ldb, count, strip + i * width);
        }
    } else {
        const T* const from = b + first * ldb + k;
        const Index whole = count == width ? depth / lanes<T> * lanes<T> : 0;  // steps that fill whole batches
        cpu::transpose(width, whole, from, ldb, strip, width);
        for (Index i = whole; i < depth; ++i)
            for (Index j = 0; j < count; ++j) strip[i * width + j] = from[j * ldb + i];
    }
}

/// The left side aᵀ as tiles of (depth, GemmTile::rows): eight rows of a at a time, whose entries fill whole
/// cache lines.
template <typename T>
void pack_transposed(const T* a, Index lda, Index depth, Index count, T* tiles) {
    constexpr int height = GemmTile<T>::rows, together = 8;
    for (Index first = 0; first < depth; first += together) {
        const Index last = std::min(depth, first + together);
        for (Index i = 0; i < count; i += height)
            for (Index k = first; k < last; ++k) {
                T* const to = tiles + i * depth + k * height;
                const T* const from = a + k * lda + i;
                // Rows are far apart: the hardware prefetcher does not predict them.
                __builtin_prefetch(from + (k + together < depth ? together * lda : 0));
                if (i + height <= count)
                    std::memcpy(to, from, height * sizeof(T));  // of a constant size: no call
                else
                    unroll<height>([&](auto r) { to[r] = from[std::min<Index>(r, count - 1 - i)]; });
            }
    }
}

/// c = alpha · a · b + add, where b is packed in strips of `depth` steps and the rows of a for the tile of row i
/// are a.from_row(i).
template <typename T>
void multiply_strips(Index m, Index n, Index depth, T alpha, const LeftSide<T>& a, const T* strips,
                     const Addend<T>& add, T* c, Index ldc) {
    using Tile = GemmTile<T>;
    for (Index first = 0; first < m; first += panel_rows)
        for (Index j = 0; j < n; j += Tile::columns)
            for (Index i = first; i < std::min(m, first + panel_rows); i += Tile::rows)
                multiply_tile(depth, alpha, a.from_row(i), strips + j * depth, add.part(i, j), c + i * ldc + j, ldc,
                              std::min(Index{Tile::rows}, m - i), n - j);
}

/// c += alpha · aᵀ · b for at most GemmTile::depth steps along k. Packs a when more than two strips of b read it.
template <typename T>
void add_transposed_block(Index m, Index n, Index depth, T alpha, const T* a, Index lda, const T* strips, T* c,
                          Index ldc) {
    using Tile = GemmTile<T>;
    LeftSide<T> left{a, 1, lda, 1};
    if (n > 2 * Tile::columns) {
        T* const tiles = thread_scratch<T, struct PackedTiles>(depth * divide_up(m, Tile::rows) * Tile::rows);
        pack_transposed(a, lda, depth, m, tiles);
        left = {tiles, 1, Tile::rows, depth};
    }
    multiply_strips(m, n, depth, alpha, left, strips, Addend<T>{nullptr, c, ldc}, c, ldc);
}

}  // namespace detail

/// The right side of many products, op(b) as (k, n): packed once, in parallel, and read by all threads.
///
/// `rows` says how many rows will be multiplied in all. Up to few_rows, nothing is packed ahead: `multiply` shares out
/// columns among the threads, which pack the strip at hand, and add_transposed must not be called. The policy and b
/// must outlive the object. With COLT5_USE_BLAS nothing is packed, either.
template <Op op, typename T>
class PackedMatrix {
public:
    PackedMatrix() = default;
    PackedMatrix(const Cpu& policy, Index k, Index n, const T* b, Index ldb, Index rows = many_rows)
        : policy_(&policy), k_(k), n_(n), b_(b), ldb_(ldb) {
        if (uses_blas || rows <= few_rows) return;
        const Index strips = divide_up(n, Tile::columns), blocks = divide_up(k, Tile::depth);
        packed_ = {policy, {k * strips * Tile::columns}};
        parallel_for(policy, strips * blocks, [&](Index i) {
            const Index first = i / blocks * Tile::columns, at = i % blocks * Tile::depth;
            pack(at, first, block(at) + first * depth_from(at));
        });
    }

    /// c = a · op(b) + add for rows of a (m, k): on the calling thread, unless the rows are few.
    void multiply(Index m, const T* a, Index lda, const Addend<T>& add, T* c, Index ldc) const {
        if (m == 0 || n_ == 0) return;
#if defined(COLT5_USE_BLAS)
        for (Index i = 0; i < m; ++i) {
            T* const to = c + i * ldc;
            if (add.matrix == nullptr)
                std::fill_n(to, n_, T(0));
            else if (add.matrix != c)
                std::copy_n(add.matrix + i * add.stride, n_, to);
            for (Index j = 0; j < n_ && add.row != nullptr; ++j) to[j] += add.row[j];
        }
        if (k_ > 0) blas_gemm(false, op == Op::transpose, m, n_, k_, T(1), a, lda, b_, ldb_, c, ldc);
#else
        const auto multiply_columns = [&](Index first, Index columns, const auto& packed_at) {
            for_each_block([&](Index at) {
                detail::multiply_strips(
                    m, columns, depth_from(at), T(1), LeftSide<T>{a + at, lda, 1, lda}, packed_at(at),
                    at == 0 ? add.part(0, first) : Addend<T>{nullptr, c + first, ldc}, c + first, ldc);
            });
        };
        if (packed_.size() > 0) return multiply_columns(0, n_, [&](Index at) { return block(at); });
        parallel_for(*policy_, divide_up(n_, Tile::columns), [&](Index strip) {
            const Index first = strip * Tile::columns;
            multiply_columns(first, std::min(Tile::columns, n_ - first), [&](Index at) {
                T* const packed = thread_scratch<T, struct PackedStrips>(Tile::depth * Tile::columns);
                pack(at, first, packed);
                return packed;
            });
        });
#endif
    }

    /// c += aᵀ · op(b) for m columns of a (k, ·) on the calling thread.
    void add_transposed(Index m, const T* a, Index lda, T* c, Index ldc) const {
        if (m == 0 || n_ == 0 || k_ == 0) return;
#if defined(COLT5_USE_BLAS)
        blas_gemm(true, op == Op::transpose, m, n_, k_, T(1), a, lda, b_, ldb_, c, ldc);
#else
        assert(packed_.size() > 0);
        for_each_block([&](Index at) {
            detail::add_transposed_block(m, n_, depth_from(at), T(1), a + at * lda, lda, block(at), c, ldc);
        });
#endif
    }

private:
    using Tile = GemmTile<T>;

    /// Calls body(first of its steps along k) for each block; at least once, so that c gets `add` also when there are
    /// no steps.
    template <typename Body>
    void for_each_block(Body&& body) const {
        Index at = 0;
        do body(at);
        while ((at += Tile::depth) < k_);
    }
    Index depth_from(Index at) const {
        return std::min(Tile::depth, k_ - at);
    }
    void pack(Index at, Index first, T* strip) const {
        detail::pack_strip<op>(b_, ldb_, at, depth_from(at), first, n_, strip);
    }
    T* block(Index at) {
        return packed_.data() + at * divide_up(n_, Tile::columns) * Tile::columns;
    }
    const T* block(Index at) const {
        return packed_.data() + at * divide_up(n_, Tile::columns) * Tile::columns;
    }

    const Cpu* policy_ = nullptr;
    Index k_ = 0, n_ = 0;
    const T* b_ = nullptr;
    Index ldb_ = 0;
    VectorTensor<T, Cpu> packed_;
};

/// c += alpha · op_a(a) · op_b(b):  op_a(a) is (m, k), op_b(b) is (k, n), c is (m, n).
template <Op op_a, Op op_b, typename T>
[[gnu::noinline]] void gemm(Index m, Index n, Index k, T alpha, const T* a, Index lda, const T* b, Index ldb, T* c,
                            Index ldc) {
    if (m == 0 || n == 0) return;
#if defined(COLT5_USE_BLAS)
    if (k > 0) blas_gemm(op_a == Op::transpose, op_b == Op::transpose, m, n, k, alpha, a, lda, b, ldb, c, ldc);
#else
    using Tile = GemmTile<T>;
    const Index strips = divide_up(n, Tile::columns);
    for (Index at = 0; at < k; at += Tile::depth) {
        const Index depth = std::min(Tile::depth, k - at);
        T* const packed = thread_scratch<T, struct PackedStrips>(depth * strips * Tile::columns);
        for (Index j = 0; j < strips; ++j)
            detail::pack_strip<op_b>(b, ldb, at, depth, j * Tile::columns, n, packed + j * depth * Tile::columns);
        if constexpr (op_a == Op::none)
            detail::multiply_strips(m, n, depth, alpha, LeftSide<T>{a + at, lda, 1, lda}, packed,
                                    Addend<T>{nullptr, c, ldc}, c, ldc);
        else
            detail::add_transposed_block(m, n, depth, alpha, a + at * lda, lda, packed, c, ldc);
    }
#endif
}

/// d_weight (out, in) += d_yᵀ · x for d_y (rows, out) and x (rows, in), which is packed. Threads share out the rows of
/// d_weight, each of which is summed up in the order of tokens: its bits do not depend on the number of threads.
template <typename T>
void add_weight_gradient(const Cpu& policy, T* d_weight, Index out, Index in, const T* d_y,
                         const PackedMatrix<Op::none, T>& x) {
    if (out == 0) return;
    constexpr Index unit = tile_rows;
    const Index threads = uses_blas ? 1 : policy.threads();
    const Index tiles = divide_up(out, unit), blocks = std::min(tiles, divide_up(out, threads * panel_rows) * threads);
    parallel_for(policy, blocks, [&](Index block) {
        const Index first = tiles * block / blocks * unit, end = std::min(out, tiles * (block + 1) / blocks * unit);
        x.add_transposed(end - first, d_y + first, out, d_weight + first * in, in);
    });
}

}  // namespace colt5::cpu
