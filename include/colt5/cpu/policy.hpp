// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <colt5/core/allocations.hpp>
#include <colt5/core/error.hpp>
#include <colt5/core/host_memory.hpp>
#include <colt5/core/policy.hpp>
#include <colt5/core/workspace.hpp>

namespace colt5 {

namespace detail {
/// Throws ValueError unless so many threads can be started, which OpenMP would end the process for.
inline void expect_system_gives(int threads) {
    static std::atomic<int> known = 1;  // so many have been started at once
    if (threads <= known) return;
    const int most = std::max(1024, 4 * static_cast<int>(std::thread::hardware_concurrency()));
    expect_value(threads <= most, "threads", colt5::detail::concat({"at most ", std::to_string(most)}), threads);
    std::mutex all_started;
    std::vector<std::thread> started;
    started.reserve(static_cast<std::size_t>(threads));
    bool given = true;
    {
        const std::lock_guard lock(all_started);
        try {
            while (given && static_cast<int>(started.size()) < threads - 1)
                started.emplace_back([&all_started] { const std::lock_guard wait(all_started); });
        } catch (const std::system_error&) {
            given = false;
        }
    }
    for (std::thread& thread : started) thread.join();
    expect_value(given, "threads",
                 colt5::detail::concat({"at most the ", std::to_string(started.size() + 1), " that the system gives"}),
                 threads);
    known = std::max(known.load(), threads);
}
}  // namespace detail

/// Runs on the host: vectors by xsimd, products by a kernel of our own or by OpenBLAS, OpenMP over `threads` threads.
/// Results do not depend on the number of threads, bit for bit. One policy serves one thread at a time. In a child of
/// fork() whose parent has used several threads, which the child does not have, everything runs on one.
class Cpu {
public:
    using Workspace = colt5::Workspace<HostMemory>;
    static constexpr MemoryPlan usual_plan{.tokens_at_a_time = 2048, .recompute = true};

    /// threads: 0 takes as many as OpenMP would: one for each processor that the process may use, or what
    /// OMP_NUM_THREADS says; 1 where the compiler has no OpenMP. Throws ValueError when `threads` is negative or more
    /// than the system gives.
    explicit Cpu(int threads = 0, MemoryPlan plan = usual_plan, Allocations allocations = default_allocations())
        : threads_(threads > 0 ? threads : default_threads()),
          plan_(plan),
          workspace_(std::make_shared<Workspace>(HostMemory(allocations))) {
        expect_value(threads >= 0, "threads", ">= 0", threads);
        expect_value(plan.tokens_at_a_time >= 1, "tokens_at_a_time", ">= 1", plan.tokens_at_a_time);
        detail::expect_system_gives(threads_);
    }

    int threads() const { return threads_; }
    const MemoryPlan& memory_plan() const { return plan_; }
    const std::shared_ptr<Workspace>& workspace() const { return workspace_; }

private:
    static int default_threads() {
#if defined(_OPENMP)
        return std::max(1, std::min(omp_get_max_threads(), omp_get_thread_limit()));
#else
        return 1;
#endif
    }

    int threads_;
    MemoryPlan plan_;
    std::shared_ptr<Workspace> workspace_;
};

inline void upload(const Cpu&, void* to, const void* from, std::size_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
}
inline void download(const Cpu&, void* to, const void* from, std::size_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
}

}  // namespace colt5
