// SPDX-License-Identifier: MIT
#pragma once

// Which CUDA graph a stream is being captured into. A graph writes to the memory of the calls that were captured, each
// time it is replayed, so these calls need a workspace that no other call gets while the graph lives.

#include <atomic>
#include <memory>

namespace colt5_python {

struct Capture {
    unsigned long long id = 0;  // 0: none
    cudaGraph_t graph = nullptr;

    Capture() = default;
    explicit Capture(cudaStream_t stream) {
        cudaStreamCaptureStatus status{};
#if CUDART_VERSION >= 13000
        colt5::cuda::check(cudaStreamGetCaptureInfo(stream, &status, &id, &graph), "cudaStreamGetCaptureInfo");
#else
        colt5::cuda::check(cudaStreamGetCaptureInfo_v2(stream, &status, &id, &graph), "cudaStreamGetCaptureInfo_v2");
#endif
        if (status != cudaStreamCaptureStatusActive) *this = {};
    }
    explicit operator bool() const {
        return id != 0;
    }
    bool operator==(const Capture& other) const {
        return id == other.id;
    }
};

/// Whether a graph, and all that was made of it, has been destroyed.
class GraphEnd {
public:
    GraphEnd() = default;
    explicit GraphEnd(const Capture& capture) : has_come_(std::make_shared<std::atomic<bool>>(false)) {
        auto shared = std::make_unique<Shared>(has_come_);
        const auto destroy = [](void* pointer) {
            const std::unique_ptr<Shared> of_graph(static_cast<Shared*>(pointer));
            (*of_graph)->store(true);
        };
        cudaUserObject_t object = nullptr;
        colt5::cuda::check(cudaUserObjectCreate(&object, shared.get(), destroy, 1, cudaUserObjectNoDestructorSync),
                           "cudaUserObjectCreate");
        static_cast<void>(shared.release());
        const auto status = cudaGraphRetainUserObject(capture.graph, object, 1, cudaGraphUserObjectMove);
        if (status != cudaSuccess) cudaUserObjectRelease(object, 1);
        colt5::cuda::check(status, "cudaGraphRetainUserObject");
    }
    bool has_come() const { return has_come_ && has_come_->load(); }

private:
    using Shared = std::shared_ptr<std::atomic<bool>>;
    Shared has_come_;
};

}  // namespace colt5_python
