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
#include <colt5/cuda/error.cuh>
#include <colt5/cuda/policy.cuh>

namespace colt5::cuda {

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

/// One product as cuBLASLt knows it. Making it asks cuBLASLt's heuristics, so the policy keeps it.
class MatmulPlan {
public:
    using Key = std::tuple<int, int, int, Index, Index, Index, Index, Index, Index, bool, bool, Index, Index, Index,
                           Index, bool, std::uint32_t>;

    template <typename T, typename C>
    MatmulPlan(cublasLtHandle_t blas, MathMode math, Index rows, Index columns, Index depth, const Operand<C>& c,
               const Operand<const T>& a, const Operand<const T>& b, Index batch, bool bias, std::uint32_t alignment) {
        // cuBLASLt computes column-major cᵀ = op(b)ᵀ op(a)ᵀ; a stored row-major matrix is its transpose in
        // column-major.
        check(cublasLtMatmulDescCreate(&operation, BlasType<T>::compute(math), BlasType<T>::scale),
              "cublasLtMatmulDescCreate");
        const cublasOperation_t left = b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
        const cublasOperation_t right = a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
        set(CUBLASLT_MATMUL_DESC_TRANSA, left);
        set(CUBLASLT_MATMUL_DESC_TRANSB, right);
        if (bias) set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
        constexpr cudaDataType_t type = BlasType<T>::data;
        b_layout = layout(type, b.transposed ? depth : columns, b.transposed ? columns : depth, b.stride, batch,
                          b.batch_stride);
        a_layout =
            layout(type, a.transposed ? rows : depth, a.transposed ? depth : rows, a.stride, batch, a.batch_stride);
        c_layout = layout(BlasType<C>::data, columns, rows, c.stride, batch, c.batch_stride);

        cublasLtMatmulPreference_t preference = nullptr;
        check(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
        const std::size_t most = std::size_t{32} << 20;
        cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most, sizeof most);
        for (const auto attribute :
             {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
              CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
            cublasLtMatmulPreferenceSetAttribute(preference, attribute, &alignment, sizeof alignment);
        cublasLtMatmulHeuristicResult_t result{};
        int found = 0;
        const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(blas, operation, b_layout, a_layout, c_layout,
                                                                     c_layout, preference, 1, &result, &found);
        cublasLtMatmulPreferenceDestroy(preference);
        check(found > 0 ? status : CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmulAlgoGetHeuristic");
        algorithm = result.algo;
        workspace_bytes = result.workspaceSize;
    }
    MatmulPlan(const MatmulPlan&) = delete;
    MatmulPlan& operator=(const MatmulPlan&) = delete;
    ~MatmulPlan() {
        cublasLtMatrixLayoutDestroy(a_layout);
        cublasLtMatrixLayoutDestroy(b_layout);
        cublasLtMatrixLayoutDestroy(c_layout);
        cublasLtMatmulDescDestroy(operation);
    }

    template <typename Value>
    void set(cublasLtMatmulDescAttributes_t attribute, const Value& value) {
        check(cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof value),
              "cublasLtMatmulDescSetAttribute");
    }

    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t a_layout = nullptr, b_layout = nullptr, c_layout = nullptr;
    cublasLtMatmulAlgo_t algorithm{};
    std::size_t workspace_bytes = 0;

private:
    static cublasLtMatrixLayout_t layout(cudaDataType_t type, Index rows, Index columns, Index stride, Index batch,
                                         Index batch_stride) {
        cublasLtMatrixLayout_t made = nullptr;
        check(cublasLtMatrixLayoutCreate(&made, type, static_cast<std::uint64_t>(rows),
                                         static_cast<std::uint64_t>(columns), stride),
              "cublasLtMatrixLayoutCreate");
        if (batch > 1) {
            const int count = static_cast<int>(batch);
            const std::int64_t distance = batch_stride;
            cublasLtMatrixLayoutSetAttribute(made, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count);
            cublasLtMatrixLayoutSetAttribute(made, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &distance,
                                             sizeof distance);
        }
        return made;
    }
};

/// The plans of one policy; see Cuda::plans.
class MatmulPlans {
public:
    template <typename... Arguments>
    MatmulPlan& get(const MatmulPlan::Key& key, const Arguments&... arguments) {
        const auto at = plans_.find(key);
        if (at != plans_.end()) return at->second;
        return plans_.try_emplace(key, arguments...).first->second;
    }

private:
    std::map<MatmulPlan::Key, MatmulPlan> plans_;
};

/// c = op(a) · op(b) + bias + add, for each matrix of a batch: op(a) is (rows, depth), op(b) (depth, columns); bias
/// (columns) and add, laid out as c and perhaps c itself, may be null. All row-major; c of type T or accumulate_t<T>.
template <typename T, typename C = T>
void matmul(const Cuda& policy, Index rows, Index columns, Index depth, const Operand<C>& c, const Operand<const T>& a,
            const Operand<const T>& b, const T* bias = nullptr, const std::type_identity_t<C>* add = nullptr,
            Index batch = 1) {
    if (rows == 0 || columns == 0 || batch == 0) return;
    const auto lowest_bit = [](const void* data) {
        const auto address = reinterpret_cast<std::uintptr_t>(data) | 256;
        return static_cast<std::uint32_t>(address & (~address + 1));
    };
    const std::uint32_t alignment =
        std::min({lowest_bit(a.data), lowest_bit(b.data), lowest_bit(c.data), lowest_bit(add)});
    const MathMode math = policy.math();
    const DeviceGuard guard(policy.device());
    MatmulPlan& plan =
        policy.plans().get(MatmulPlan::Key{static_cast<int>(BlasType<T>::data), static_cast<int>(BlasType<C>::data),
                                           static_cast<int>(math), rows, columns, depth, a.stride, b.stride, c.stride,
                                           a.transposed, b.transposed, batch, a.batch_stride, b.batch_stride,
                                           c.batch_stride, bias != nullptr, alignment},
                           policy.blas(), math, rows, columns, depth, c, a, b, batch, bias != nullptr, alignment);
    if (bias != nullptr) plan.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    using Scale = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const Scale alpha = 1, beta = add != nullptr ? 1 : 0;
    VectorTensor<std::uint8_t, Cuda> workspace(policy, {static_cast<Index>(plan.workspace_bytes)});
    check(cublasLtMatmul(policy.blas(), plan.operation, &alpha, b.data, plan.b_layout, a.data, plan.a_layout, &beta,
                         add != nullptr ? add : c.data, plan.c_layout, c.data, plan.c_layout, &plan.algorithm,
                         workspace.data(), plan.workspace_bytes, policy.stream()),
          "cublasLtMatmul");
}

}  // namespace colt5::cuda

namespace colt5 {
inline std::shared_ptr<cuda::MatmulPlans> Cuda::make_matmul_plans() {
    return std::make_shared<cuda::MatmulPlans>();
}
}  // namespace colt5
