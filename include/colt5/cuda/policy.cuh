// SPDX-License-Identifier: MIT
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <memory>
#include <string>
#include <utility>

#include <colt5/core/policy.hpp>
#include <colt5/cuda/device_memory.cuh>
#include <colt5/cuda/error.cuh>

namespace colt5 {

/// How float matrix products are computed: in float, or by the tensor cores with inputs rounded to 10 bits of mantissa.
enum class MathMode { fp32, tf32 };

namespace cuda {

class MatmulPlans;  // cuda/matmul.cuh

}  // namespace cuda

/// Runs on an NVIDIA GPU: kernels of our own, and cuBLASLt for matrix products, all on one stream.
///
/// Tensors live on the device. Their memory is handed out in the order of the stream: a tensor that is freed may be
/// used again by a later operation of the same policy, which runs after everything before it. Work on tensors of one
/// policy from another stream, or after the policy's last tensor is gone, needs `synchronize()` first. Operations
/// return when their work is queued; `upload` and `download` wait. Same inputs, same policy: same bits.
class Cuda {
public:
    using Workspace = colt5::Workspace<cuda::DeviceMemory>;

    struct Options {
        int device = 0;
        MathMode math = MathMode::fp32;
        MemoryPlan memory_plan{.tokens_at_a_time = 32768, .recompute = false};
        /// Null: the policy makes a stream of its own.
        cudaStream_t stream = nullptr;
    };

    Cuda() : Cuda(Options{}) {}
    explicit Cuda(const Options& options) : state_(std::make_shared<State>(options)) {}

    int device() const { return state_->device; }
    cudaStream_t stream() const { return state_->stream; }
    MathMode math() const { return state_->math; }
    const MemoryPlan& memory_plan() const { return state_->memory_plan; }
    const std::shared_ptr<Workspace>& workspace() const { return state_->workspace; }
    cublasLtHandle_t blas() const { return state_->blas; }
    cuda::MatmulPlans& plans() const { return *state_->plans; }

    /// Waits until all work of the policy is done; throws CudaError if any of it failed.
    void synchronize() const { cuda::check(cudaStreamSynchronize(stream()), "cudaStreamSynchronize"); }

private:
    struct State {
        explicit State(const Options& options)
            : device(options.device),
              math(options.math),
              memory_plan(options.memory_plan),
              workspace(std::make_shared<Workspace>(cuda::DeviceMemory(options.device))),
              plans(make_matmul_plans()) {
            const cuda::DeviceGuard guard(device);
            cuda::check(cublasLtCreate(&blas), "cublasLtCreate");
            stream = options.stream;
            if (stream != nullptr) return;
            cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
            owns_stream = true;
        }
        State(const State&) = delete;
        State& operator=(const State&) = delete;
        ~State() {
            cublasLtDestroy(blas);
            if (owns_stream) cudaStreamDestroy(stream);
        }
        int device;
        MathMode math;
        MemoryPlan memory_plan;
        cudaStream_t stream = nullptr;
        bool owns_stream = false;
        cublasLtHandle_t blas = nullptr;
        std::shared_ptr<Workspace> workspace;
        std::shared_ptr<cuda::MatmulPlans> plans;
    };
    static std::shared_ptr<cuda::MatmulPlans> make_matmul_plans();

    std::shared_ptr<State> state_;
};

template <HalfPrecision Scalar>
inline constexpr bool is_module_scalar<Scalar, Cuda> = true;

inline void upload(const Cuda& policy, void* to, const void* from, std::size_t bytes) {
    if (bytes == 0) return;
    cuda::check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, policy.stream()), "cudaMemcpyAsync");
    policy.synchronize();
}
inline void download(const Cuda& policy, void* to, const void* from, std::size_t bytes) {
    if (bytes == 0) return;
    cuda::check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, policy.stream()), "cudaMemcpyAsync");
    policy.synchronize();
}

}  // namespace colt5
