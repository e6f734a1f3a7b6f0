// SPDX-License-Identifier: MIT
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <memory>
#include <utility>

#include <colt5/core/policy.hpp>
#include <colt5/core/scalar.hpp>
#include <colt5/core/workspace.hpp>
#include <colt5/cuda/device_memory.cuh>

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

/// Runs on an NVIDIA GPU: kernels of our own, and cuBLASLt for matrix products. A policy has one stream, and
/// a side policy with a second one (see side_policy).
///
/// Tensors live on the device. Their memory is handed out in the order of the stream: the memory of a freed
/// tensor may be reused by later operations of the same policy, which run after all earlier ones. Call `synchronize()`
/// before another stream uses a policy's tensors. Operations return when their work is queued; `upload` and `download`
/// wait. Same inputs, same policy: same bits.
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
    cuda::MatmulPlans& plans() const { return *state_->plans; }

    /// A point in the order of a stream's work. All Events of a policy are one cudaEvent_t: after another
    /// record_event(), an earlier Event means the later point.
    struct Event {
        cudaEvent_t handle = nullptr;  // null: there is nothing to wait for
    };
    /// The event behind all that is queued so far.
    Event record_event() const {
        const cuda::DeviceGuard guard(device());
        cuda::check(cudaEventRecord(state_->event.handle, stream()), "cudaEventRecord");
        return {state_->event.handle};
    }
    /// Work that is queued from now on runs after the event. The host does not wait.
    void wait_event(Event event) const {
        if (event.handle == nullptr) return;
        const cuda::DeviceGuard guard(device());
        cuda::check(cudaStreamWaitEvent(stream(), event.handle), "cudaStreamWaitEvent");
    }

    /// The policy of the side stream, with a workspace of its own: see SideStream in module/module.hpp.
    const Cuda& side_policy() const {
        if (!state_->side) {
            const Options options{
                .device = device(), .math = math(), .memory_plan = memory_plan(), .allocations = state_->allocations};
            state_->side.reset(new Cuda(std::make_shared<State>(options, true)));
        }
        return *state_->side;
    }

    /// What this policy's workspace and its side stream's hold. `peak` is an upper bound: the two peaks may fall at
    /// different times.
    WorkspaceStatistics statistics() const {
        WorkspaceStatistics total = workspace()->statistics();
        if (!state_->side) return total;
        const WorkspaceStatistics more = state_->side->statistics();
        total.in_use += more.in_use;
        total.peak += more.peak;
        total.reserved += more.reserved;
        total.system_allocations += more.system_allocations;
        return total;
    }
    void reset_peak() const {
        workspace()->reset_peak();
        if (state_->side) state_->side->reset_peak();
    }

    /// Waits until all work on the policy's stream is done, and work on side streams that has joined it; throws
    /// CudaError if any of it failed.
    void synchronize() const {
        const cuda::DeviceGuard guard(device());
        cuda::check(cudaStreamSynchronize(stream()), "cudaStreamSynchronize");
    }

private:
    struct State {
        explicit State(const Options& options, bool is_side = false)
            : device(options.device),
              math(options.math),
              memory_plan(options.memory_plan),
              allocations(options.allocations),
              workspace(std::make_shared<Workspace>(cuda::DeviceMemory(options.device, options.allocations))) {
            expect_value(memory_plan.tokens_at_a_time >= 1, "tokens_at_a_time", ">= 1", memory_plan.tokens_at_a_time);
            const cuda::DeviceGuard guard(device);
            plans = make_matmul_plans();
            cuda::check(cudaEventCreateWithFlags(&event.handle, cudaEventDisableTiming), "cudaEventCreateWithFlags");
            stream = options.stream;
            if (stream != nullptr) return;
            // The side stream has the highest priority: its kernels are small and would wait behind the large ones.
            int lowest = 0, highest = 0;
            cuda::check(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange");
            cuda::check(
                cudaStreamCreateWithPriority(&own_stream.handle, cudaStreamNonBlocking, is_side ? highest : lowest),
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
        std::shared_ptr<Workspace> workspace;
        std::shared_ptr<cuda::MatmulPlans> plans;
        std::unique_ptr<Cuda> side;
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
    const cuda::DeviceGuard guard(policy.device());  // the memory of a workspace is mapped for this device only
    cuda::check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, policy.stream()), "cudaMemcpyAsync");
    policy.synchronize();
}
inline void download(const Cuda& policy, void* to, const void* from, std::size_t bytes) {
    if (bytes == 0) return;
    const cuda::DeviceGuard guard(policy.device());
    cuda::check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, policy.stream()), "cudaMemcpyAsync");
    policy.synchronize();
}

}  // namespace colt5
