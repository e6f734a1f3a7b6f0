// SPDX-License-Identifier: MIT
#pragma once

#include <Eigen/Core>
#include <colt5/core/error.hpp>
#include <colt5/cpu/scratch.hpp>

#ifdef EIGEN_USE_BLAS
extern "C" [[gnu::weak]] void openblas_set_num_threads(int);
#endif

namespace colt5::cpu {

#ifdef EIGEN_USE_BLAS
/// Before main: OpenBLAS would start threads of its own under each of ours. The whole program gets this setting.
inline const bool openblas_keeps_to_the_calling_thread = [] {
    if (openblas_set_num_threads != nullptr) openblas_set_num_threads(1);
    return openblas_set_num_threads != nullptr;
}();
#endif

enum class Op { none, transpose };

/// c += alpha · op_a(a) · op_b(b) on row-major panels, on the calling thread:
/// op_a(a) is (m, k), op_b(b) is (k, n), c is (m, n); `lda`, `ldb`, `ldc` are the distances between stored rows.
///
/// Calls Eigen's product below the level of expressions: there it never starts threads of its own, takes its packing
/// buffers from us instead of malloc, and compiles once per layout. With EIGEN_USE_BLAS this very entry goes to the
/// BLAS.
template <Op op_a, Op op_b, typename T>
[[gnu::noinline]] void gemm(Index m, Index n, Index k, T alpha, const T* a, Index lda, const T* b, Index ldb, T* c,
                            Index ldc) {
    using namespace Eigen::internal;
    if (m == 0 || n == 0 || k == 0) return;
    // Eigen's kernel writes column-major results, so it computes cᵀ = op_b(b)ᵀ · op_a(a)ᵀ; a stored row-major matrix is
    // its transpose stored column-major.
    constexpr int left_order = op_b == Op::none ? Eigen::ColMajor : Eigen::RowMajor;
    constexpr int right_order = op_a == Op::none ? Eigen::ColMajor : Eigen::RowMajor;
    struct Blocking : level3_blocking<T, T> {
        Blocking(Index rows, Index columns, Index depth) {
            this->m_mc = rows;
            this->m_nc = columns;
            this->m_kc = depth;
            computeProductBlockingSizes<T, T>(this->m_kc, this->m_mc, this->m_nc, Index{1});
            const Index left = this->m_kc * this->m_mc, right = this->m_kc * this->m_nc;
            this->m_blockA = thread_scratch<T, struct LeftPack>(left);
            this->m_blockB = thread_scratch<T, struct RightPack>(right);
        }
    } blocking(n, m, k);
    general_matrix_matrix_product<Index, T, left_order, false, T, right_order, false, Eigen::ColMajor, 1>::run(
        n, m, k, b, ldb, a, lda, c, 1, ldc, alpha, blocking, nullptr);
}

}  // namespace colt5::cpu
