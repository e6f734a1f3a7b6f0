// SPDX-License-Identifier: MIT
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <memory>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

#include <colt5/core/allocations.hpp>
#include <colt5/core/error.hpp>
#include <colt5/core/policy.hpp>
#include <colt5/core/scalar.hpp>
#include <colt5/core/view.hpp>
#include <colt5/core/workspace.hpp>

namespace colt5 {

/// A call of CUDA or cuBLAS failed. The message has the call, the file, the line and the library's description of the
/// error.
class CudaError : public Error {
public:
    using Error::Error;
};

namespace cuda {

[[noreturn]] inline void fail(const char* call, const char* reason, const std::source_location& at) {
    throw CudaError(colt5::detail::concat(
        {"colt5: ", call, " failed: ", reason, " (", at.file_name(), ":", std::to_string(at.line()), ")"}));
}

/// Throws CudaError unless the call succeeded: check(cudaStreamCreate(&stream), "cudaStreamCreate").
inline void check(cudaError_t status, const char* call,
                  const std::source_location& at = std::source_location::current()) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // clears the error, which the next launch would report again
    fail(call, cudaGetErrorString(status), at);
}

/// Makes a device current for the lifetime of the guard.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&previous_), "cudaGetDevice");
        if (previous_ != device) check(cudaSetDevice(device), "cudaSetDevice");
        changed_ = previous_ != device;
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }

private:
    int previous_ = 0;
    bool changed_ = false;
};

/// While it lives, this thread may ask the device for memory although a stream is being captured into a CUDA graph.
class AllocationsInCapture {
public:
    AllocationsInCapture() {
        check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode");
    }
    AllocationsInCapture(const AllocationsInCapture&) = delete;
    AllocationsInCapture& operator=(const AllocationsInCapture&) = delete;
    ~AllocationsInCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// The driver's functions that map memory. They are looked up at run time, so that programs need not link with the
/// driver.
struct Driver {
    decltype(&cuMemAddressReserve) reserve = find<decltype(&cuMemAddressReserve)>("cuMemAddressReserve");
    decltype(&cuMemAddressFree) free = find<decltype(&cuMemAddressFree)>("cuMemAddressFree");
    decltype(&cuMemGetAllocationGranularity) granularity =
        find<decltype(&cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity");
    decltype(&cuMemCreate) create = find<decltype(&cuMemCreate)>("cuMemCreate");
    decltype(&cuMemRelease) release = find<decltype(&cuMemRelease)>("cuMemRelease");
    decltype(&cuMemMap) map = find<decltype(&cuMemMap)>("cuMemMap");
    decltype(&cuMemUnmap) unmap = find<decltype(&cuMemUnmap)>("cuMemUnmap");
    decltype(&cuMemSetAccess) set_access = find<decltype(&cuMemSetAccess)>("cuMemSetAccess");

    static const Driver& get() {
        static const Driver driver;
        return driver;
    }

private:
    template <typename Function>
    static Function find(const char* name) {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result{};
        check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &result), name);
        if (function == nullptr) fail(name, "the driver has no such function", std::source_location::current());
        return reinterpret_cast<Function>(function);
    }
};

inline void check(CUresult status, const char* call, const std::source_location& at = std::source_location::current()) {
    if (status != CUDA_SUCCESS) fail(call, colt5::detail::concat({"error ", std::to_string(status)}).c_str(), at);
}

/// A range of a device's addresses, as large as the device's memory. Memory is mapped to the beginning of the range, at
/// least as much as `resize` was asked for.
class DeviceMemory {
public:
    DeviceMemory(int device, Allocations allocations) : device_(device), allocations_(allocations) {
        int devices = 0;
        check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
        if (device < 0 || device >= devices)
            expect_value(false, "device", colt5::detail::concat({"from 0 to ", std::to_string(devices - 1)}), device);
        const DeviceGuard guard(device);
        std::size_t free = 0;
        check(cudaMemGetInfo(&free, &capacity_), "cudaMemGetInfo");
        properties_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
        properties_.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
        properties_.location.id = device;
        check(Driver::get().granularity(&granularity_, &properties_, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
              "cuMemGetAllocationGranularity");
        capacity_ = round_up(capacity_);
        check(Driver::get().reserve(&begin_, capacity_, 0, 0, 0), "cuMemAddressReserve");
    }
    DeviceMemory(DeviceMemory&& other) noexcept
        : device_(other.device_),
          allocations_(other.allocations_),
          properties_(other.properties_),
          granularity_(other.granularity_),
          capacity_(other.capacity_),
          size_(std::exchange(other.size_, 0)),
          begin_(std::exchange(other.begin_, 0)),
          pieces_(std::move(other.pieces_)) {}
    DeviceMemory& operator=(DeviceMemory&&) = delete;
    ~DeviceMemory() {
        if (begin_ == 0) return;
        int current = 0;
        cudaGetDevice(&current);
        cudaSetDevice(device_);
        cudaDeviceSynchronize();  // no kernel may still use it
        while (!pieces_.empty()) unmap_last();
        Driver::get().free(begin_, capacity_);
        cudaSetDevice(current);
    }

    std::byte* begin() const { return reinterpret_cast<std::byte*>(begin_); }

    /// Maps or unmaps memory, so that the first `bytes` can be used. Throws OutOfMemory, and changes nothing then.
    void resize(std::size_t bytes) {
        const DeviceGuard guard(device_);
        const AllocationsInCapture allowed;
        const std::size_t end = round_up(bytes);
        if (end > size_) {
            grow_by(end - size_);
        } else if (!pieces_.empty() && size_ - pieces_.back().bytes >= end) {
            check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
            while (!pieces_.empty() && size_ - pieces_.back().bytes >= end) unmap_last();
        }
    }

    bool separate() const { return allocations_ != Allocations::together; }
    /// Allocates memory outside the range. Throws OutOfMemory.
    void* allocate(std::size_t bytes) const {
        const DeviceGuard guard(device_);
        const AllocationsInCapture allowed;
        void* data = nullptr;
        const cudaError_t status = cudaMalloc(&data, bytes);
        if (status == cudaErrorMemoryAllocation) {
            cudaGetLastError();  // clears the error, which the next launch would report otherwise
            fail_to_grow(bytes);
        }
        check(status, "cudaMalloc");
        if (allocations_ == Allocations::separate_with_nan) {
            try {
                check(cudaMemset(data, 0xFF, bytes), "cudaMemset");
                check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
            } catch (const CudaError&) {
                cudaFree(data);
                throw;
            }
        }
        return data;
    }
    void deallocate(void* data) const {
        int current = 0;
        cudaGetDevice(&current);
        cudaSetDevice(device_);
        cudaDeviceSynchronize();
        cudaFree(data);
        cudaSetDevice(current);
    }

private:
    struct Piece {
        CUmemGenericAllocationHandle handle;
        std::size_t bytes;
    };

    std::size_t round_up(std::size_t bytes) const { return colt5::round_up(bytes, granularity_); }
    void grow_by(std::size_t bytes) {
        Piece piece{0, bytes};
        pieces_.reserve(pieces_.size() + 1);
        if (bytes > capacity_ - size_) fail_to_grow(bytes);
        const CUresult created = Driver::get().create(&piece.handle, bytes, &properties_, 0);
        if (created == CUDA_ERROR_OUT_OF_MEMORY) fail_to_grow(bytes);
        check(created, "cuMemCreate");
        const CUresult mapped = Driver::get().map(begin_ + size_, bytes, 0, piece.handle, 0);
        if (mapped != CUDA_SUCCESS) Driver::get().release(piece.handle);
        check(mapped, "cuMemMap");
        pieces_.push_back(piece);
        size_ += bytes;
        CUmemAccessDesc access{};
        access.location = properties_.location;
        access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        const CUresult granted = Driver::get().set_access(begin_ + size_ - bytes, bytes, &access, 1);
        if (granted != CUDA_SUCCESS) unmap_last();
        check(granted, "cuMemSetAccess");
    }
    void unmap_last() {
        const Piece piece = pieces_.back();
        size_ -= piece.bytes;
        Driver::get().unmap(begin_ + size_, piece.bytes);
        Driver::get().release(piece.handle);
        pieces_.pop_back();
    }
    [[noreturn]] void fail_to_grow(std::size_t bytes) const {
        std::size_t free = 0, total = 0;
        cudaMemGetInfo(&free, &total);
        throw OutOfMemory(colt5::detail::concat({"colt5: out of memory on device ", std::to_string(device_),
                                                 ": a workspace of ", std::to_string(size_ >> 20), " MiB asked for ",
                                                 std::to_string(bytes >> 20), " MiB more, ", std::to_string(free >> 20),
                                                 " of ", std::to_string(total >> 20), " MiB are free"}));
    }

    int device_;
    Allocations allocations_;
    CUmemAllocationProp properties_{};
    std::size_t granularity_ = 0, capacity_ = 0, size_ = 0;
    CUdeviceptr begin_ = 0;
    std::vector<Piece> pieces_;
};

}  // namespace cuda

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
/// a side policy with a second one (see side_policy); Ragged uses a few more such pairs (see enter_stream).
///
/// Tensors live on the device. Their memory is handed out in the order of the stream: the memory of a freed
/// tensor may be reused by later operations of the same stream, which run after all earlier ones. Call `synchronize()`
/// before another stream uses a policy's tensors. Operations return when their work is queued; `upload` and `download`
/// wait. Same inputs, same policy: same bits.
class Cuda {
public:
    using Workspace = colt5::Workspace<cuda::DeviceMemory>;
    static constexpr std::size_t max_streams = 4;

    struct Options {
        int device = 0;
        MathMode math = MathMode::fp32;
        MemoryPlan memory_plan{.tokens_at_a_time = 32768, .recompute = false};
        /// Null: the policy makes a stream of its own.
        cudaStream_t stream = nullptr;
        Allocations allocations = Allocations::together;
        /// How many of the module's calls inside a call of Ragged run at the same time, from 1 to max_streams. Each has
        /// a workspace, and in backward gradients of the parameters.
        std::size_t concurrent_streams = max_streams;
    };

    Cuda() : Cuda(Options{}) {}
    explicit Cuda(const Options& options) : state_(make_state(options)) {}

    int device() const { return state_->device; }
    cudaStream_t stream() const { return state_->current->stream; }
    /// What is queued from now on goes to another stream. All that has been queued before must be finished, or the
    /// other stream must wait for it.
    void use_stream(cudaStream_t stream) const { state_->current->stream = stream; }
    MathMode math() const { return state_->math; }
    const MemoryPlan& memory_plan() const { return state_->memory_plan; }
    const std::shared_ptr<Workspace>& workspace() const { return state_->current->workspace; }
    cuda::MatmulPlans& plans() const { return *state_->plans; }
    /// An address that the copies of a policy share, on all of its streams.
    const void* identity() const { return state_.get(); }

    /// A point in the order of a stream's work. All Events of a stream are one cudaEvent_t: after another
    /// record_event(), an earlier Event means the later point.
    struct Event {
        cudaEvent_t handle = nullptr;  // null: there is nothing to wait for
    };
    /// The event behind all that is queued so far.
    Event record_event() const {
        const cuda::DeviceGuard guard(device());
        const cudaEvent_t event = state_->current->event.handle;
        cuda::check(cudaEventRecord(event, stream()), "cudaEventRecord");
        return {event};
    }
    /// Work that is queued from now on runs after the event. The host does not wait.
    void wait_event(Event event) const {
        if (event.handle == nullptr) return;
        const cuda::DeviceGuard guard(device());
        cuda::check(cudaStreamWaitEvent(stream(), event.handle), "cudaStreamWaitEvent");
    }

    /// The policy of the side stream, with a workspace of its own: see SideStream in module/module.hpp.
    const Cuda& side_policy() const {
        std::unique_ptr<Cuda>& side = state_->current->side;
        if (!side) side.reset(new Cuda(make_state(own_options(), true)));
        return *side;
    }

    /// Until the next call of this function, the policy and its copies use another stream, with an event, a workspace
    /// and a side stream of its own; number 0 is the policy's own. See ConcurrentStreams in
    /// schedule/concurrent_streams.hpp.
    void enter_stream(std::size_t stream) const {
        while (state_->streams.size() <= stream) {
            const cuda::AllocationsInCapture allowed;
            state_->streams.push_back(std::make_unique<StreamState>(own_options(), false));
        }
        state_->current = state_->streams[stream].get();
        state_->entered = stream;
    }
    std::size_t entered_stream() const { return state_->entered; }
    std::size_t concurrent_streams() const { return state_->concurrent_streams; }

    /// What the workspaces of all streams of this policy hold. `peak` is an upper bound: the peaks may
    /// fall at different times.
    WorkspaceStatistics statistics() const {
        WorkspaceStatistics total;
        const auto add = [&](const WorkspaceStatistics& more) {
            total.in_use += more.in_use;
            total.peak += more.peak;
            total.reserved += more.reserved;
            total.system_allocations += more.system_allocations;
        };
        for (const auto& stream : state_->streams) {
            add(stream->workspace->statistics());
            if (stream->side) add(stream->side->statistics());
        }
        return total;
    }
    void reset_peak() const {
        for (const auto& stream : state_->streams) {
            stream->workspace->reset_peak();
            if (stream->side) stream->side->reset_peak();
        }
    }

    /// Hands memory that no tensor uses back to the system (see Workspace::release_unused), on all streams.
    void release_unused() const {
        for (const auto& stream : state_->streams) {
            stream->workspace->release_unused();
            if (stream->side) stream->side->release_unused();
        }
    }

    /// Waits until all work on the policy's stream is done, and work on side streams that has joined it; throws
    /// CudaError if any of it failed.
    void synchronize() const {
        const cuda::DeviceGuard guard(device());
        cuda::check(cudaStreamSynchronize(stream()), "cudaStreamSynchronize");
    }

private:
    /// A stream, with the memory of what runs on it.
    struct StreamState {
        StreamState(const Options& options, bool is_side)
            : stream(options.stream),
              workspace(std::make_shared<Workspace>(cuda::DeviceMemory(options.device, options.allocations))) {
            const cuda::DeviceGuard guard(options.device);
            cuda::check(cudaEventCreateWithFlags(&event.handle, cudaEventDisableTiming), "cudaEventCreateWithFlags");
            if (stream != nullptr) return;
            // The side stream has the highest priority: its kernels are small and would wait behind the large ones.
            int lowest = 0, highest = 0;
            cuda::check(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange");
            cuda::check(
                cudaStreamCreateWithPriority(&own_stream.handle, cudaStreamNonBlocking, is_side ? highest : lowest),
                "cudaStreamCreateWithPriority");
            stream = own_stream.handle;
        }
        cuda::Owned<cudaStream_t, cudaStreamDestroy> own_stream;
        cudaStream_t stream;
        cuda::Owned<cudaEvent_t, cudaEventDestroy> event;
        std::shared_ptr<Workspace> workspace;
        std::unique_ptr<Cuda> side;
    };
    struct State {
        State(const Options& options, bool is_side)
            : device(options.device),
              math(options.math),
              memory_plan(options.memory_plan),
              allocations(options.allocations),
              concurrent_streams(options.concurrent_streams) {
            expect_value(concurrent_streams >= 1 && concurrent_streams <= max_streams, "concurrent_streams",
                         "from 1 to 4", concurrent_streams);
            streams.push_back(std::make_unique<StreamState>(options, is_side));
            current = streams.front().get();
            expect_value(memory_plan.tokens_at_a_time >= 1, "tokens_at_a_time", ">= 1", memory_plan.tokens_at_a_time);
            const cuda::DeviceGuard guard(device);
            plans = make_matmul_plans();
        }
        int device;
        MathMode math;
        MemoryPlan memory_plan;
        Allocations allocations;
        std::size_t concurrent_streams;
        std::vector<std::unique_ptr<StreamState>> streams;  // the first is the policy's own
        std::size_t entered = 0;                            // the number of the one in use
        StreamState* current = nullptr;                     // the one in use
        std::shared_ptr<cuda::MatmulPlans> plans;
    };
    static std::shared_ptr<State> make_state(const Options& options, bool is_side = false) {
        const cuda::AllocationsInCapture allowed;
        return std::make_shared<State>(options, is_side);
    }
    static std::shared_ptr<cuda::MatmulPlans> make_matmul_plans();

    explicit Cuda(std::shared_ptr<State> state) : state_(std::move(state)) {}

    /// Those of this policy, but with a stream to be made.
    Options own_options() const {
        return {.device = device(), .math = math(), .memory_plan = memory_plan(), .allocations = state_->allocations};
    }

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
