// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <atomic>
#include <concepts>
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
#include <colt5/core/workspace.hpp>

namespace colt5 {

/// How modules trade memory for time.
struct MemoryPlan {
    /// The light branches take about so many tokens through all of their layers before the next ones, so that what lies
    /// between two layers is small and stays in caches.
    Index tokens_at_a_time;
    /// The light branches keep little from forward to backward, which computes the rest again: a tenth more work.
    bool recompute;
};

/// Where tensors live and which kernels run. A policy is a cheap handle: copies share one workspace.
///
///     typename P::Workspace                         what allocates (see workspace.hpp)
///     policy.workspace()                            std::shared_ptr<Workspace>
///     policy.memory_plan()                          how modules trade memory for time
///     upload(policy, device, host, bytes)           copies from the host to where the policy's tensors live, and waits
///     download(policy, host, device, bytes)         and back
///
/// An operation `x` finds its kernels as overloads `x_kernel(const P&, …)` in the policy's namespace.
template <typename P>
concept Policy = std::copyable<P> && requires(const P& policy, void* to, const void* from) {
    typename P::Workspace;
    policy.workspace()->allocate(std::size_t{});
    policy.memory_plan().tokens_at_a_time;
    upload(policy, to, from, std::size_t{});
    download(policy, to, from, std::size_t{});
};

/// Whether the modules run in a scalar type on a policy. Policies with kernels for others specialize it.
template <typename Scalar, typename P>
inline constexpr bool is_module_scalar = std::same_as<Scalar, float> || std::same_as<Scalar, double>;

/// Whether kernels clean padding while they read tokens (see op/clean_padding.hpp), because the host must not wait to
/// look at it first. Policies for which that is so specialize it.
template <typename P>
inline constexpr bool cleans_as_it_reads = false;

/// Used in the message of a missing kernel: `static_assert(has_kernel<Policy>, "…")`.
template <typename>
inline constexpr bool has_kernel = false;

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

/// Lets a part of a computation run beside the rest: from construction to `join`, work under `policy()` and work under
/// the policy itself need not be in order. Until then, neither may write or free what the other uses; but what was
/// queued beside before the last `mark` may be read after `wait_for_mark`. Joins when it is destroyed. A policy that
/// has nothing to run it on does it in line.
template <Policy P>
class Beside {
public:
    explicit Beside(const P& policy) : policy_(policy) {}
    const P& policy() const { return policy_; }
    void mark() {}
    void wait_for_mark() {}
    void join() {}

private:
    const P& policy_;
};

inline void upload(const Cpu&, void* to, const void* from, std::size_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
}
inline void download(const Cpu&, void* to, const void* from, std::size_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
}

}  // namespace colt5
