// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <colt5/core/error.hpp>

/// Memory accesses of 16 bytes.
namespace colt5::cuda {

/// `count` neighbours in memory, moved by one instruction.
template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
    T values[count];
};

/// Elements of 16 bytes.
template <typename T>
inline constexpr int pack_size = 16 / static_cast<int>(sizeof(T));

/// Whether rows of `length` elements, one after the other from each of the addresses, can be moved in packs.
template <typename T, typename... Pointers>
bool fits_packs(Index length, const Pointers*... rows) {
    return length % pack_size<T> == 0 && ((reinterpret_cast<std::uintptr_t>(rows) % 16 == 0) && ...);
}

template <int count, typename T>
__device__ Pack<T, count> load_pack(const T* from) {
    return *reinterpret_cast<const Pack<T, count>*>(from);
}
template <typename T, int count>
__device__ void store_pack(T* to, const Pack<T, count>& pack) {
    *reinterpret_cast<Pack<T, count>*>(to) = pack;
}

}  // namespace colt5::cuda
