// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/cpu/gemm.hpp>
#include <colt5/cpu/simd.hpp>

/// Products of small matrices that are in L1 or L2 and whose rows are whole batches: what attention consists
/// of, where packing for `gemm` would cost as much as the product.
namespace colt5::cpu {

/// The block of results that stays in registers: rows × batches, beside one row of the right side.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int block_rows = 8, block_batches = 2;
#else
inline constexpr int block_rows = 6, block_batches = 2;
#endif

namespace detail {
/// Entry (r, k) of the left side lies at r · row_stride + k · depth_stride.
template <int batches, typename T>
[[gnu::noinline, gnu::flatten]] void block_product(bool add, Index depth, const T* a, Index row_stride,
                                                   Index depth_stride, const T* b, Index ldb, T* c, Index ldc) {
    std::array<const T*, block_rows> row;
    unroll<block_rows>([&](auto r) { row[r] = a + r * row_stride; });
    Batch<T> sum[block_rows][std::size_t{batches}];
    unroll<block_rows, batches>(
        [&](auto r, auto v) { sum[r][v] = add ? load(c + r * ldc + v * lanes<T>) : Batch<T>(T(0)); });
    accumulate(sum, depth, row, depth_stride, b, ldb);
    unroll<block_rows, batches>([&](auto r, auto v) { store(c + r * ldc + v * lanes<T>, sum[r][v]); });
}
}  // namespace detail

/// c = op_a(a) · b, or c += with `add`, for block_rows rows of c and a number of batches of columns: op_a(a) is
/// (block_rows, depth), b (depth, batches · lanes). Each entry is one sum over the depth in order.
template <Op op_a, typename T>
void rows_product(bool add, Index batches, Index depth, const T* a, Index lda, const T* b, Index ldb, T* c, Index ldc) {
    const Index row_stride = op_a == Op::none ? lda : 1, depth_stride = op_a == Op::none ? 1 : lda;
    Index v = 0;
    for (; v + block_batches <= batches; v += block_batches)
        detail::block_product<block_batches>(add, depth, a, row_stride, depth_stride, b + v * lanes<T>, ldb,
                                             c + v * lanes<T>, ldc);
    for (; v < batches; ++v)
        detail::block_product<1>(add, depth, a, row_stride, depth_stride, b + v * lanes<T>, ldb, c + v * lanes<T>, ldc);
}

}  // namespace colt5::cpu
