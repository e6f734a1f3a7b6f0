// SPDX-License-Identifier: MIT
#pragma once

#include <cublasLt.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <tuple>
#include <type_traits>

#include <colt5/core/scalar.hpp>
#include <colt5/core/tensor.hpp>
#include <colt5/cuda/kernel.cuh>
#include <colt5/cuda/policy.cuh>

namespace colt5::cuda {

inline void check(cublasStatus_t status, const char* call,
                  const std::source_location& at = std::source_location::current()) {
    if (status != CUBLAS_STATUS_SUCCESS) fail(call, cublasLtGetStatusString(status), at);
}

template <typename T>
struct BlasType;
template <>
struct BlasType<double> {
    static constexpr cudaDataType_t data = CUDA_R_64F, scale = CUDA_R_64F;
    static cublasComputeType_t compute(MathMode) { return CUBLAS_COMPUTE_64F; }
};
template <>
struct BlasType<float> {
    static constexpr cudaDataType_t data = CUDA_R_32F, scale = CUDA_R_32F;
    static cublasComputeType_t compute(MathMode math) {
        return math == MathMode::tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    }
};
template <HalfPrecision T>
struct BlasType<T> {
    static constexpr cudaDataType_t data = std::is_same_v<T, bfloat16> ? CUDA_R_16BF : CUDA_R_16F, scale = CUDA_R_32F;
    static cublasComputeType_t compute(MathMode) { return CUBLAS_COMPUTE_32F; }
};

/// A stored row-major matrix: rows are `stride` elements apart, the matrices of a batch `batch_stride`.
template <typename T>
struct Operand {
    T* data;
    Index stride;
    bool transposed = false;
    Index batch_stride = 0;
};

/// How an inner product may be summed.
enum class Sums {
    by_row,  ///< no split-K: a row of c has the same bits for every batch size. They depend on the row of a, on b, and
             ///< on the shape of one matrix
    shared   ///< several blocks may share a sum (split-K), which is fast: the bits depend on all extents
};

/// The extents of a product of a batch of matrices.
struct MatmulShape {
    Index rows, columns, depth, batch;
};

/// cuBLASLt's layouts of the operands of a product.
struct MatmulLayouts {
    using Layout = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;

    static void make(Layout& layout, cudaDataType_t type, Index rows, Index columns, Index stride, Index batch,
                     Index batch_stride) {
        check(cublasLtMatrixLayoutCreate(&layout.handle, type, static_cast<std::uint64_t>(rows),
                                         static_cast<std::uint64_t>(columns), stride),
              "cublasLtMatrixLayoutCreate");
        if (batch == 1) return;
        const auto count = static_cast<std::int32_t>(batch);
        const std::int64_t distance = batch_stride;
        check(cublasLtMatrixLayoutSetAttribute(layout.handle, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count),
              "cublasLtMatrixLayoutSetAttribute");
        check(cublasLtMatrixLayoutSetAttribute(layout.handle, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &distance,
                                               sizeof distance),
              "cublasLtMatrixLayoutSetAttribute");
    }
    Layout a, b, c;
};

/// The constraints on cuBLASLt's heuristics.
class MatmulPreference {
public:
    MatmulPreference(std::uint32_t alignment, Sums sums) {
        check(cublasLtMatmulPreferenceCreate(&owned_.handle), "cublasLtMatmulPreferenceCreate");
        set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, max_workspace_bytes);
        if (sums == Sums::by_row) set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, CUBLASLT_REDUCTION_SCHEME_NONE);
        for (const auto attribute :
             {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
              CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
            set(attribute, alignment);
    }
    cublasLtMatmulPreference_t handle() const { return owned_.handle; }

    static constexpr std::size_t max_workspace_bytes = std::size_t{32} << 20;

private:
    template <typename Value>
    void set(cublasLtMatmulPreferenceAttributes_t attribute, const Value& value) {
        check(cublasLtMatmulPreferenceSetAttribute(owned_.handle, attribute, &value, sizeof value),
              "cublasLtMatmulPreferenceSetAttribute");
    }
    Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy> owned_;
};

/// cuBLASLt's descriptors and algorithm of one product. Its constructor asks cuBLASLt's heuristics, which is slow; so
/// the policy stores plans in MatmulPlans.
///
/// With Sums::by_row, the algorithm is chosen for one matrix of the batch, among those that do not split inner
/// products. Each thread block computes one tile of c, and sums in an order that does not depend on where the tile is.
/// So a matrix of a batch has the same bits as when it is multiplied alone. An algorithm for few rows would be slow for
/// a large batch, so it is chosen for at least `min_rows` rows.
class MatmulPlan {
public:
    using Key = std::tuple<int, int, int, Index, Index, Index, Index, Index, Index, bool, bool, Index, Index, Index,
                           Index, Index, bool, std::uint32_t, Sums>;
    static constexpr Index min_rows = 2048;

    /// `one` is the product of one matrix of the batch, `all` the whole product.
    template <typename T, typename C>
    MatmulPlan(cublasLtHandle_t blas, MathMode math, const MatmulShape& one, const MatmulShape& all,
               const Operand<C>& c, const Operand<const T>& a, const Operand<const T>& b, bool bias,
               std::uint32_t alignment, Sums sums) {
        // cuBLASLt computes column-major cᵀ = op(b)ᵀ op(a)ᵀ; a stored row-major matrix is its transpose in
        // column-major.
        check(cublasLtMatmulDescCreate(&operation.handle, BlasType<T>::compute(math), BlasType<T>::scale),
              "cublasLtMatmulDescCreate");
        const cublasOperation_t left = b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
        const cublasOperation_t right = a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
        set(CUBLASLT_MATMUL_DESC_TRANSA, left);
        set(CUBLASLT_MATMUL_DESC_TRANSB, right);
        if (bias) set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);

        const MatmulPreference preference(alignment, sums);
        const auto make = [&](MatmulLayouts& to, const MatmulShape& shape) {
            constexpr cudaDataType_t type = BlasType<T>::data;
            to.make(to.b, type, b.transposed ? shape.depth : shape.columns, b.transposed ? shape.columns : shape.depth,
                    b.stride, shape.batch, b.batch_stride);
            to.make(to.a, type, a.transposed ? shape.rows : shape.depth, a.transposed ? shape.depth : shape.rows,
                    a.stride, shape.batch, a.batch_stride);
            to.make(to.c, BlasType<C>::data, shape.columns, shape.rows, c.stride, shape.batch, c.batch_stride);
        };
        const auto choose = [&](const MatmulLayouts& of) {
            cublasLtMatmulHeuristicResult_t result{};
            int found = 0;
            const cublasStatus_t status =
                cublasLtMatmulAlgoGetHeuristic(blas, operation.handle, of.b.handle, of.a.handle, of.c.handle,
                                               of.c.handle, preference.handle(), 1, &result, &found);
            check(found > 0 ? status : CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmulAlgoGetHeuristic");
            algorithm = result.algo;
            workspace_bytes = result.workspaceSize;
        };
        const auto works = [&](const MatmulLayouts& with) {
            cublasLtMatmulHeuristicResult_t result{};
            const cublasStatus_t status = cublasLtMatmulAlgoCheck(blas, operation.handle, with.b.handle, with.a.handle,
                                                                  with.c.handle, with.c.handle, &algorithm, &result);
            if (status != CUBLAS_STATUS_SUCCESS || result.state != CUBLAS_STATUS_SUCCESS ||
                result.workspaceSize > MatmulPreference::max_workspace_bytes)
                return false;
            workspace_bytes = std::max(workspace_bytes, result.workspaceSize);
            return true;
        };
        make(layouts, all);
        if (sums == Sums::shared) {
            choose(layouts);
            return;
        }
        MatmulLayouts for_one, for_min_rows;
        make(for_one, one);
        make(for_min_rows, {std::max(one.rows, min_rows), one.columns, one.depth, 1});
        choose(for_min_rows);
        if (!works(for_one)) choose(for_one);
        fits = works(layouts);
    }
    MatmulPlan(const MatmulPlan&) = delete;
    MatmulPlan& operator=(const MatmulPlan&) = delete;
    template <typename Value>
    void set(cublasLtMatmulDescAttributes_t attribute, const Value& value) {
        check(cublasLtMatmulDescSetAttribute(operation.handle, attribute, &value, sizeof value),
              "cublasLtMatmulDescSetAttribute");
    }

    Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy> operation;
    MatmulLayouts layouts;
    cublasLtMatmulAlgo_t algorithm{};
    std::size_t workspace_bytes = 0;
    bool fits = true;  ///< whether the algorithm of one matrix can compute the whole product
};

/// The plans of one policy, and its handle of cuBLASLt for the device that is current; see Cuda::plans.
class MatmulPlans {
public:
    MatmulPlans() { check(cublasLtCreate(&blas_.handle), "cublasLtCreate"); }

    cublasLtHandle_t blas() const { return blas_.handle; }
    template <typename... Arguments>
    MatmulPlan& get(const MatmulPlan::Key& key, const Arguments&... arguments) {
        const auto at = plans_.find(key);
        if (at != plans_.end()) return at->second;
        return plans_.try_emplace(key, blas(), arguments...).first->second;
    }

private:
    Owned<cublasLtHandle_t, cublasLtDestroy> blas_;
    std::map<MatmulPlan::Key, MatmulPlan> plans_;
};

/// Tokens (batch, length, dim), contiguous, as a batch of matrices.
template <typename T>
Operand<T> token_matrices(T* data, Index length, Index dim) {
    return {data, dim, false, length * dim};
}

/// c = bias + add, each of which may be null, for each (rows, columns) matrix of a batch; `count` entries in all.
template <typename T, typename C>
__global__ void empty_product(Operand<C> c, const T* bias, const C* add, Index rows, Index columns, Index count) {
    using Sum = accumulate_t<T>;
    for (Index i = global_thread(); i < count; i += grid_threads()) {
        const Index row = quotient(i, columns), column = i - row * columns, matrix = quotient(row, rows);
        const Index at = matrix * c.batch_stride + (row - matrix * rows) * c.stride + column;
        const Sum of_bias = bias != nullptr ? static_cast<Sum>(bias[column]) : Sum(0);
        c.data[at] = static_cast<C>(of_bias + (add != nullptr ? static_cast<Sum>(add[at]) : Sum(0)));
    }
}

/// c = op(a) · op(b) + bias + add, for each matrix of a batch: op(a) is (rows, depth), op(b) (depth, columns); bias
/// (columns) and add, laid out as c and perhaps c itself, may be null. All row-major; c of type T or accumulate_t<T>.
template <typename T, typename C = T>
void matmul(const Cuda& policy, Index rows, Index columns, Index depth, const Operand<C>& c, const Operand<const T>& a,
            const Operand<const T>& b, const T* bias = nullptr, const std::type_identity_t<C>* add = nullptr,
            Index batch = 1, Sums sums = Sums::by_row) {
    if (rows == 0 || columns == 0 || batch == 0) return;
    if (depth == 0) {  // cuBLASLt need not accept empty matrices
        constexpr int threads = 256;
        const Index count = batch * rows * columns;
        return launch(policy, "empty_product", empty_product<T, C>, blocks_for(count, threads), threads, 0, c, bias,
                      add, rows, columns, count);
    }
    const auto part = [&](Index first, Index count) {
        const auto from = [&](auto operand) {
            operand.data += first * operand.batch_stride;
            return operand;
        };
        matmul<T, C>(policy, rows, columns, depth, from(c), from(a), from(b), bias,
                     add != nullptr ? add + first * c.batch_stride : nullptr, count, sums);
    };
    // If the rows of all matrices follow each other and b is shared, they are one matrix.
    const bool is_one = batch == 1 || (!a.transposed && a.batch_stride == rows * a.stride && b.batch_stride == 0 &&
                                       c.batch_stride == rows * c.stride);
    constexpr Index max_batch = 65535;
    if (!is_one && batch > max_batch) {
        for (Index first = 0; first < batch; first += max_batch) part(first, std::min(max_batch, batch - first));
        return;
    }
    const MatmulShape one{rows, columns, depth, 1};
    const MatmulShape all{is_one ? batch * rows : rows, columns, depth, is_one ? 1 : batch};

    // The alignment of every row; batch strides are multiples of row strides.
    const auto lowest_bit = [](std::uintptr_t bytes) {
        return static_cast<std::uint32_t>((bytes | 256) & (~(bytes | 256) + 1));
    };
    const auto alignment_of = [&](const auto& operand) {
        return lowest_bit(reinterpret_cast<std::uintptr_t>(operand.data) |
                          static_cast<std::uintptr_t>(operand.stride) * sizeof(*operand.data));
    };
    const std::uint32_t alignment = std::min(
        {alignment_of(a), alignment_of(b), alignment_of(c), lowest_bit(reinterpret_cast<std::uintptr_t>(add))});
    const MathMode math = policy.math();
    const DeviceGuard guard(policy.device());
    MatmulPlan& plan =
        policy.plans().get(MatmulPlan::Key{static_cast<int>(BlasType<T>::data), static_cast<int>(BlasType<C>::data),
                                           static_cast<int>(math), rows, columns, depth, a.stride, b.stride, c.stride,
                                           a.transposed, b.transposed, all.rows, all.batch, a.batch_stride,
                                           b.batch_stride, c.batch_stride, bias != nullptr, alignment, sums},
                           math, one, all, c, a, b, bias != nullptr, alignment, sums);
    if (!plan.fits && batch > 1) {
        for (Index i = 0; i < batch; ++i) part(i, 1);
        return;
    }
    if (bias != nullptr) plan.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    using Scale = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const Scale alpha = 1, beta = add != nullptr ? 1 : 0;
    const MatmulLayouts& layouts = plan.layouts;
    VectorTensor<std::uint8_t, Cuda> workspace(policy, {static_cast<Index>(plan.workspace_bytes)});
    check(cublasLtMatmul(policy.plans().blas(), plan.operation.handle, &alpha, b.data, layouts.b.handle, a.data,
                         layouts.a.handle, &beta, add != nullptr ? add : c.data, layouts.c.handle, c.data,
                         layouts.c.handle, &plan.algorithm, workspace.data(), plan.workspace_bytes, policy.stream()),
          "cublasLtMatmul");
}

}  // namespace colt5::cuda

namespace colt5 {
[[gnu::used]] inline std::shared_ptr<cuda::MatmulPlans> Cuda::make_matmul_plans() {
    return std::make_shared<cuda::MatmulPlans>();
}
}  // namespace colt5
