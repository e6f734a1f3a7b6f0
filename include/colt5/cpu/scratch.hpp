// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstring>
#include <new>

#include <colt5/core/allocations.hpp>
#include <colt5/core/error.hpp>

namespace colt5::cpu {

/// Bytes for thread_scratch, aligned to 64.
class ScratchBuffer {
public:
    ScratchBuffer() = default;
    ScratchBuffer(const ScratchBuffer&) = delete;
    ScratchBuffer& operator=(const ScratchBuffer&) = delete;
    ~ScratchBuffer() { ::operator delete(data_, alignment); }

    /// Where the compiler looks for stray accesses, exactly so many, and new ones are filled with NaN.
    void* of(std::size_t bytes) {
        if (is_sanitized ? bytes != bytes_ : bytes > bytes_) {
            void* const data = ::operator new(bytes, alignment);
            if (is_sanitized) std::memset(data, 0xFF, bytes);
            ::operator delete(data_, alignment);
            data_ = data;
            bytes_ = bytes;
        }
        return data_;
    }

private:
    static constexpr std::align_val_t alignment{64};
    void* data_ = nullptr;
    std::size_t bytes_ = 0;
};

/// Memory of one thread that grows once and is given back when the thread ends: packing buffers and tiles of the
/// kernels. `Use` is any type; it tells apart buffers that are in use at the same time: thread_scratch<float, struct
/// Scores>(n). Named so in a function, the type is that function's own, and so is the buffer.
template <typename T, typename Use>
T* thread_scratch(Index count) {
    thread_local ScratchBuffer buffer;
    return static_cast<T*>(buffer.of(static_cast<std::size_t>(count) * sizeof(T)));
}

}  // namespace colt5::cpu
