// SPDX-License-Identifier: MIT
#pragma once

#include <chrono>
#include <ostream>
#include <stdexcept>
#include <string>
#include <vector>

#include <colt5/cuda.cuh>

/// What measure.hpp needs to know of the GPU. BENCH_SCALAR is the type of element of the program.
namespace bench {

using Policy = colt5::Cuda;
using Scalar = BENCH_SCALAR;
using colt5::cuda::check;

inline Policy make_policy(const std::string& dtype) {
    const bool is_float = dtype == "fp32" || dtype == "tf32";
    if (std::same_as<Scalar, float> != is_float || (!is_float && dtype != "bf16"))
        throw std::invalid_argument("this program is not one for " + dtype);
    return Policy({.math = dtype == "tf32" ? colt5::MathMode::tf32 : colt5::MathMode::fp32});
}

class Event {
public:
    Event() { check(cudaEventCreate(&event_), "cudaEventCreate"); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    ~Event() { cudaEventDestroy(event_); }

    void record(const Policy& policy) { check(cudaEventRecord(event_, policy.stream()), "cudaEventRecord"); }
    double seconds_since(const Event& before) const {
        float milliseconds = 0;
        check(cudaEventElapsedTime(&milliseconds, before.event_, event_), "cudaEventElapsedTime");
        return milliseconds * 1e-3;
    }

private:
    cudaEvent_t event_ = nullptr;
};

/// A call as a CUDA graph.
class Graph {
public:
    template <typename Once>
    Graph(const Policy& policy, const Once& once) : policy_(policy) {
        check(cudaStreamBeginCapture(policy.stream(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
        once();
        cudaGraph_t graph = nullptr;
        check(cudaStreamEndCapture(policy.stream(), &graph), "cudaStreamEndCapture");
        const cudaError_t status = cudaGraphInstantiate(&executable_, graph, 0);
        cudaGraphDestroy(graph);
        check(status, "cudaGraphInstantiate");
    }
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
    ~Graph() { cudaGraphExecDestroy(executable_); }

    void operator()() const { check(cudaGraphLaunch(executable_, policy_.stream()), "cudaGraphLaunch"); }

private:
    const Policy& policy_;
    cudaGraphExec_t executable_ = nullptr;
};

class Meter {
public:
    static constexpr const char* library = "cuBLASLt";

    explicit Meter(const Policy& policy) : policy_(policy) {}

    /// Gives the memory back that other processes need meanwhile.
    void rest() const {
        policy_.synchronize();
        policy_.release_unused();
    }
    void start() {
        rest();
        policy_.reset_peak();
        before_bytes_ = policy_.statistics().in_use;
        free_before_bytes_ = free_bytes();
        begin_ = Clock::now();
    }
    void stop(std::ostream& answer) const {
        policy_.synchronize();
        const std::chrono::duration<double> seconds = Clock::now() - begin_;
        const double bytes = static_cast<double>(policy_.statistics().peak - before_bytes_);
        answer << seconds.count() << ' ' << bytes / (1 << 20) << ' ' << (free_before_bytes_ - free_bytes()) / (1 << 20);
    }

    /// Waits after each call, so that a call whose launches take longer than its kernels shows it.
    template <typename Once>
    std::vector<double> time(int count, const Once& once) {
        std::vector<double> seconds;
        Event begin, end;
        for (int i = 0; i < count; ++i) {
            begin.record(policy_);
            once();
            end.record(policy_);
            policy_.synchronize();
            seconds.push_back(end.seconds_since(begin));
        }
        return seconds;
    }
    template <typename Once>
    std::vector<double> replay(int count, const Once& once) {
        const Graph graph(policy_, once);
        graph();  // the first launch uploads it
        return time(count, graph);
    }

private:
    using Clock = std::chrono::steady_clock;

    static double free_bytes() {
        std::size_t free = 0, total = 0;
        check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
        return static_cast<double>(free);
    }

    const Policy& policy_;
    std::size_t before_bytes_ = 0;
    double free_before_bytes_ = 0;
    Clock::time_point begin_;
};

}  // namespace bench
