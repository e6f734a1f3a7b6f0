// SPDX-License-Identifier: MIT
#pragma once

#if defined(COLT5_USE_BLAS)

#include <cblas.h>

#include <limits>

#include <colt5/core/view.hpp>

/// The BLAS in place of our own products of matrices: docs/blas.md says what a program has to set.
namespace colt5::cpu {

/// c += alpha · op_a(a) · op_b(b) for row-major float or double, where op may transpose. Throws ValueError where an
/// extent exceeds the 32 bits of a BLAS.
template <typename T>
void blas_gemm(bool transpose_a, bool transpose_b, Index m, Index n, Index k, T alpha, const T* a, Index lda,
               const T* b, Index ldb, T* c, Index ldc) {
    const auto op = [](bool transpose) { return transpose ? CblasTrans : CblasNoTrans; };
    const auto extent = [](Index i) {
        expect_value(i <= std::numeric_limits<int>::max(), "extent of a product", "at most 2^31 - 1 for a BLAS", i);
        return static_cast<int>(i);
    };
    const auto call = [&](auto* gemm) {
        gemm(CblasRowMajor, op(transpose_a), op(transpose_b), extent(m), extent(n), extent(k), alpha, a, extent(lda), b,
             extent(ldb), T(1), c, extent(ldc));
    };
    if constexpr (sizeof(T) == sizeof(float))
        call(cblas_sgemm);
    else
        call(cblas_dgemm);
}

}  // namespace colt5::cpu

#endif
