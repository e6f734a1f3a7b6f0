// SPDX-License-Identifier: MIT
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <string>
#include <utility>

#include <colt5/core/error.hpp>

namespace colt5 {

/// A range of the host's addresses, as large as its physical memory, of which the first `resize(bytes)` may be used.
/// Pages take memory when they are first written.
class HostMemory {
public:
    HostMemory() : capacity_(physical_memory()) {
        while (true) {
            void* const range = mmap(nullptr, capacity_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (range != MAP_FAILED) {
                begin_ = static_cast<std::byte*>(range);
                break;
            }
            capacity_ /= 2;  // a limit on addresses: less has to do
            if (capacity_ < page_size()) throw OutOfMemory("colt5: the system gives no addresses to a workspace");
        }
    }
    HostMemory(HostMemory&& other) noexcept
        : begin_(std::exchange(other.begin_, nullptr)), capacity_(other.capacity_), size_(other.size_) {}
    HostMemory& operator=(HostMemory&&) = delete;
    ~HostMemory() {
        if (begin_ != nullptr) munmap(begin_, capacity_);
    }

    std::byte* begin() const { return begin_; }

    /// Throws OutOfMemory.
    void resize(std::size_t bytes) {
        const std::size_t page = page_size(), end = (bytes + page - 1) / page * page;
        if (end > capacity_) fail(bytes);
        if (end > size_) {
            if (mprotect(begin_ + size_, end - size_, PROT_READ | PROT_WRITE) != 0) fail(bytes);
#if defined(MADV_HUGEPAGE)
            madvise(begin_ + size_, end - size_, MADV_HUGEPAGE);  // fewer page faults; only a wish
#endif
        } else if (end < size_) {
            if (mmap(begin_ + end, size_ - end, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
                     0) == MAP_FAILED)
                fail(bytes);
        }
        size_ = end;
    }

private:
    static std::size_t page_size() {
        return static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    }
    static std::size_t physical_memory() {
        return static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) * page_size();
    }
    [[noreturn]] void fail(std::size_t bytes) const {
        throw OutOfMemory(colt5::detail::concat({"colt5: out of memory: a workspace of ", std::to_string(size_ >> 20),
                                                 " MiB asked for ", std::to_string(bytes >> 20), " MiB, the host has ",
                                                 std::to_string(capacity_ >> 20), " MiB"}));
    }

    std::byte* begin_ = nullptr;
    std::size_t capacity_, size_ = 0;
};

}  // namespace colt5
