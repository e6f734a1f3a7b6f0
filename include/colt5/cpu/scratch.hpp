// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <colt5/core/error.hpp>

namespace colt5::cpu {

/// Memory of one thread that grows once and is given back when the thread ends: packing buffers and tiles of the
/// kernels. `Use` is any type; it tells apart buffers that are in use at the same time: thread_scratch<float, struct
/// Scores>(n). Named so in a function, the type is that function's own, and so is the buffer.
template <typename T, typename Use>
T* thread_scratch(Index count) {
    constexpr std::size_t alignment = 64;
    thread_local std::vector<std::byte> bytes;
    const std::size_t needed = static_cast<std::size_t>(count) * sizeof(T) + alignment;
    if (bytes.size() < needed) bytes.resize(needed);
    const auto address = reinterpret_cast<std::uintptr_t>(bytes.data());
    return reinterpret_cast<T*>(bytes.data() + (alignment - address % alignment) % alignment);
}

}  // namespace colt5::cpu
