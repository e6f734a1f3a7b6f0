// SPDX-License-Identifier: MIT
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <memory>
#include <string>
#include <utility>

#include <colt5/core/allocations.hpp>
#include <colt5/core/policy.hpp>
#include <colt5/core/workspace.hpp>
#include <colt5/cuda/device_memory.cuh>
#include <colt5/cuda/error.cuh>

namespace colt5 {

/// How float matrix products are computed: in float, or by the tensor cores with inputs rounded to 10 bits of mantissa.
enum class MathMode { fp32, tf32 };

namespace cuda {

class MatmulPlans;  // cuda/matmul.cuh

/// A handle of one of CUDA's libraries, destroyed with its owner.
template <typename Handle, auto destroy>
class Owned {
public:
    Owned() = default;
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    ~Owned() {
        if (handle != nullptr) destroy(handle);
    }
    Handle handle = nullptr;
};

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
        Allocations allocations = Allocations::together;
    };

    Cuda() : Cuda(Options{}) {}
    explicit Cuda(const Options& options) : state_(std::make_shared<State>(options)) {}

    int device() const { return state_->device; }
    cudaStream_t stream() const { return state_->stream; }
    MathMode math() const { return state_->math; }
    const MemoryPlan& memory_plan() const { return state_->memory_plan; }
    const std::shared_ptr<Workspace>& workspace() const { return state_->workspace; }
    cublasLtHandle_t blas() const { return state_->blas.handle; }
    cuda::MatmulPlans& plans() const { return *state_->plans; }

    /// Work that is queued from now on runs after all that `other` has queued so far. The host does not wait.
    void wait_for(const Cuda& other) const {
        other.mark();
        wait_for_mark(other);
    }
    /// The two halves of it: a mark behind all that is queued here, and waiting for the last mark of `other`.
    void mark() const {
        const cuda::DeviceGuard guard(device());
        cuda::check(cudaEventRecord(state_->event.handle, stream()), "cudaEventRecord");
    }
    void wait_for_mark(const Cuda& other) const {
        const cuda::DeviceGuard guard(device());
        cuda::check(cudaStreamWaitEvent(stream(), other.state_->event.handle), "cudaStreamWaitEvent");
    }

    /// The policy of what runs beside this one's work, with a stream and a workspace of its own: see Beside.
    const Cuda& beside() const {
        if (!state_->beside) {
            const Options options{
                .device = device(), .math = math(), .memory_plan = memory_plan(), .allocations = state_->allocations};
            state_->beside.reset(new Cuda(std::make_shared<State>(options, true)));
        }
        return *state_->beside;
    }

    /// What this policy's workspace and that of the work beside hold; `peak` adds up what may not have been at once.
    WorkspaceStatistics statistics() const {
        WorkspaceStatistics total = workspace()->statistics();
        if (!state_->beside) return total;
        const WorkspaceStatistics more = state_->beside->statistics();
        total.in_use += more.in_use;
        total.peak += more.peak;
        total.reserved += more.reserved;
        total.system_allocations += more.system_allocations;
        return total;
    }
    void reset_peak() const {
        workspace()->reset_peak();
        if (state_->beside) state_->beside->reset_peak();
    }

    /// Waits until all work of the policy is done; throws CudaError if any of it failed.
    void synchronize() const { cuda::check(cudaStreamSynchronize(stream()), "cudaStreamSynchronize"); }

private:
    struct State {
        explicit State(const Options& options, bool is_beside = false)
            : device(options.device),
              math(options.math),
              memory_plan(options.memory_plan),
              allocations(options.allocations),
              workspace(std::make_shared<Workspace>(cuda::DeviceMemory(options.device, options.allocations))),
              plans(make_matmul_plans()) {
            expect_value(memory_plan.tokens_at_a_time >= 1, "tokens_at_a_time", ">= 1", memory_plan.tokens_at_a_time);
            const cuda::DeviceGuard guard(device);
            cuda::check(cublasLtCreate(&blas.handle), "cublasLtCreate");
            cuda::check(cudaEventCreateWithFlags(&event.handle, cudaEventDisableTiming), "cudaEventCreateWithFlags");
            stream = options.stream;
            if (stream != nullptr) return;
            // What runs beside is small: it fills in where the rest leaves room, and should not come last.
            int lowest = 0, highest = 0;
            cuda::check(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange");
            cuda::check(
                cudaStreamCreateWithPriority(&own_stream.handle, cudaStreamNonBlocking, is_beside ? highest : lowest),
                "cudaStreamCreateWithPriority");
            stream = own_stream.handle;
        }
        int device;
        MathMode math;
        MemoryPlan memory_plan;
        Allocations allocations;
        cuda::Owned<cudaStream_t, cudaStreamDestroy> own_stream;
        cudaStream_t stream = nullptr;
        cuda::Owned<cudaEvent_t, cudaEventDestroy> event;
        cuda::Owned<cublasLtHandle_t, cublasLtDestroy> blas;
        std::shared_ptr<Workspace> workspace;
        std::shared_ptr<cuda::MatmulPlans> plans;
        std::unique_ptr<Cuda> beside;
    };
    static std::shared_ptr<cuda::MatmulPlans> make_matmul_plans();

    explicit Cuda(std::shared_ptr<State> state) : state_(std::move(state)) {}

    std::shared_ptr<State> state_;
};

template <HalfPrecision Scalar>
inline constexpr bool is_module_scalar<Scalar, Cuda> = true;
template <>
inline constexpr bool cleans_as_it_reads<Cuda> = true;

inline void upload(const Cuda& policy, void* to, const void* from, std::size_t bytes) {
    if (bytes == 0) return;
    const cuda::DeviceGuard guard(policy.device());  // the only one that may touch its policies' memory
    cuda::check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, policy.stream()), "cudaMemcpyAsync");
    policy.synchronize();
}
inline void download(const Cuda& policy, void* to, const void* from, std::size_t bytes) {
    if (bytes == 0) return;
    const cuda::DeviceGuard guard(policy.device());
    cuda::check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, policy.stream()), "cudaMemcpyAsync");
    policy.synchronize();
}

/// A second stream. What was allocated on one side may be freed on the other once they have joined.
template <>
class Beside<Cuda> {
public:
    explicit Beside(const Cuda& policy) : main_(policy), beside_(policy.beside()) { beside_.wait_for(main_); }
    Beside(const Beside&) = delete;
    Beside& operator=(const Beside&) = delete;
    ~Beside() {
        try {
            join();
        } catch (const CudaError&) {  // another exception is on its way
        }
    }

    const Cuda& policy() const { return beside_; }
    void mark() { beside_.mark(); }
    void wait_for_mark() { main_.wait_for_mark(beside_); }
    /// Again does nothing.
    void join() {
        if (!joined_) main_.wait_for(beside_);
        joined_ = true;
    }

private:
    const Cuda& main_;
    const Cuda& beside_;
    bool joined_ = false;
};

}  // namespace colt5
