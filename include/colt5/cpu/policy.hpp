// SPDX-License-Identifier: MIT
#pragma once

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <colt5/core/allocations.hpp>
#include <colt5/core/error.hpp>
#include <colt5/core/policy.hpp>
#include <colt5/core/view.hpp>
#include <colt5/core/workspace.hpp>

namespace colt5 {

/// A range of the host's addresses of which the first `resize(bytes)` may be used: as large as the physical memory, or
/// small and one of several where the process may only have so many addresses (RLIMIT_AS). Pages take memory when they
/// are first written.
class HostMemory {
public:
    explicit HostMemory(Allocations allocations = Allocations::together) : allocations_(allocations) {
        if (!separate()) reserve(addresses_are_limited() ? first_of_several : physical_memory(), page_size());
    }
    HostMemory(HostMemory&& other) noexcept
        : allocations_(other.allocations_),
          begin_(std::exchange(other.begin_, nullptr)),
          capacity_(other.capacity_),
          size_(other.size_) {}
    HostMemory& operator=(HostMemory&&) = delete;
    ~HostMemory() {
        if (begin_ != nullptr) munmap(begin_, capacity_);
    }

    std::byte* begin() const { return begin_; }
    std::size_t capacity() const { return capacity_; }

    /// Throws OutOfMemory.
    void resize(std::size_t bytes) {
        const std::size_t page = page_size();
        if (bytes > capacity_) fail(size_, bytes);
        const std::size_t end = round_up(bytes, page);
        if (end > size_) {
            if (mprotect(begin_ + size_, end - size_, PROT_READ | PROT_WRITE) != 0) fail(size_, bytes);
#if defined(MADV_HUGEPAGE)
            madvise(begin_ + size_, end - size_, MADV_HUGEPAGE);  // fewer page faults; only a wish
#endif
        } else if (end < size_) {
            if (mmap(begin_ + end, size_ - end, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
                     0) == MAP_FAILED)
                fail(size_, bytes);
        }
        size_ = end;
    }

    /// Another range, for `bytes` at least, where those at hand hold `held` bytes: as large as these, if that is to be
    /// had, so that there are few. Throws OutOfMemory.
    static HostMemory more(std::size_t bytes, std::size_t held) {
        if (bytes > physical_memory() || held > physical_memory() - bytes) fail(held, held + bytes);
        HostMemory memory{Unreserved()};
        if (!memory.reserve(std::max(bytes, held), bytes)) fail(held, held + bytes);
        return memory;
    }

    /// Whether every block is an allocation of its own: see Allocations.
    bool separate() const {
        return allocations_ != Allocations::together;
    }
    void* allocate(std::size_t bytes) const {
        void* const data = bytes > physical_memory() ? nullptr : ::operator new(bytes, alignment, std::nothrow);
        if (data == nullptr) fail(0, bytes);
        if (allocations_ == Allocations::separate_with_nan) std::memset(data, 0xFF, bytes);
        return data;
    }
    void deallocate(void* data) const {
        ::operator delete(data, alignment);
    }

private:
    struct Unreserved {};
    explicit HostMemory(Unreserved) {}

    static constexpr std::align_val_t alignment{256};
    static constexpr std::size_t first_of_several = std::size_t{16} << 20;

    /// Addresses for `bytes`, or as many as there are, but `least`.
    bool reserve(std::size_t bytes, std::size_t least) {
        const std::size_t page = page_size();
        for (capacity_ = round_up(bytes, page); capacity_ >= least; capacity_ = capacity_ / 2 / page * page) {
            void* const range = mmap(nullptr, capacity_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (range != MAP_FAILED) {
                begin_ = static_cast<std::byte*>(range);
                return true;
            }
        }
        capacity_ = 0;
        return false;
    }
    static bool addresses_are_limited() {
        rlimit limit{};
        return getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
    }
    static std::size_t page_size() {
        return static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    }
    static std::size_t physical_memory() {
        return static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) * page_size();
    }
    [[noreturn]] static void fail(std::size_t held, std::size_t bytes) {
        throw OutOfMemory(colt5::detail::concat(
            {"colt5: out of memory: a workspace of ", std::to_string(held >> 20), " MiB asked for ",
             std::to_string(bytes >> 20), " MiB, the host has ", std::to_string(physical_memory() >> 20), " MiB",
             addresses_are_limited() ? ", and the process may only have so many addresses (RLIMIT_AS)" : ""}));
    }

    Allocations allocations_ = Allocations::together;
    std::byte* begin_ = nullptr;
    std::size_t capacity_ = 0, size_ = 0;
};

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
