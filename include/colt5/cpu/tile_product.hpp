// SPDX-License-Identifier: MIT
#pragma once

#include <Eigen/Core>
#include <colt5/cpu/gemm.hpp>
#include <colt5/cpu/simd.hpp>

/// Products of small matrices that are in the nearest caches and whose rows are whole batches: what attention consists
/// of, where packing for `gemm` would cost as much as the product.
namespace colt5::cpu {

/// The block of results that stays in registers: rows × batches, beside one row of the right side.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int block_rows = 8, block_batches = 2;
#else
inline constexpr int block_rows = 4, block_batches = 2;
#endif

namespace detail {
template <Op op_a, int batches, typename T>
void block_product(bool add, Index depth, const T* a, Index lda, const T* b, Index ldb, T* c, Index ldc) {
    Batch<T> sum[block_rows][batches];
#pragma GCC unroll 8
    for (int r = 0; r < block_rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < batches; ++v) sum[r][v] = add ? load(c + r * ldc + v * lanes<T>) : Batch<T>(T(0));
    for (Index t = 0; t < depth; ++t) {
        Batch<T> right[batches];
#pragma GCC unroll 8
        for (int v = 0; v < batches; ++v) right[v] = load(b + t * ldb + v * lanes<T>);
#pragma GCC unroll 8
        for (int r = 0; r < block_rows; ++r) {
            const Batch<T> left(op_a == Op::none ? a[r * lda + t] : a[t * lda + r]);
#pragma GCC unroll 8
            for (int v = 0; v < batches; ++v) sum[r][v] = xsimd::fma(left, right[v], sum[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < block_rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < batches; ++v) store(c + r * ldc + v * lanes<T>, sum[r][v]);
}
}  // namespace detail

/// c = op_a(a) · b, or c += with `add`, for block_rows rows of c and a number of batches of columns: op_a(a) is
/// (block_rows, depth), b (depth, batches · lanes). Each entry is one sum over the depth in order.
template <Op op_a, typename T>
void rows_product(bool add, Index batches, Index depth, const T* a, Index lda, const T* b, Index ldb, T* c, Index ldc) {
    Index v = 0;
    for (; v + block_batches <= batches; v += block_batches)
        detail::block_product<op_a, block_batches>(add, depth, a, lda, b + v * lanes<T>, ldb, c + v * lanes<T>, ldc);
    for (; v < batches; ++v)
        detail::block_product<op_a, 1>(add, depth, a, lda, b + v * lanes<T>, ldb, c + v * lanes<T>, ldc);
}

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"  // Eigen's packets as template arguments
/// to (columns, rows) = fromᵀ, where the numbers of rows and columns are divisible by the size of Eigen's packets.
template <typename T>
void transpose(Index rows, Index columns, const T* from, Index stride, T* to, Index to_stride) {
    using namespace Eigen::internal;
    using Packet = typename packet_traits<T>::type;
    constexpr Index size = unpacket_traits<Packet>::size;
    for (Index i = 0; i < rows; i += size)
        for (Index j = 0; j < columns; j += size) {
            PacketBlock<Packet, size> block;
            for (Index r = 0; r < size; ++r) block.packet[r] = ploadu<Packet>(from + (i + r) * stride + j);
            ptranspose(block);
            for (Index c = 0; c < size; ++c) pstoreu(to + (j + c) * to_stride + i, block.packet[c]);
        }
}
#pragma GCC diagnostic pop

}  // namespace colt5::cpu
