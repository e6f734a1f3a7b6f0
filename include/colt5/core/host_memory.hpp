// SPDX-License-Identifier: MIT
#pragma once

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include <colt5/core/allocations.hpp>
#include <colt5/core/error.hpp>

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
        const std::size_t end = (bytes + page - 1) / page * page;
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
        for (capacity_ = (bytes + page - 1) / page * page; capacity_ >= least;
             capacity_ = capacity_ / 2 / page * page) {
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

}  // namespace colt5
