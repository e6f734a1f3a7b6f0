// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <colt5/core/scalar.hpp>
#include <colt5/cuda/launch.cuh>

/// Vectorized memory accesses, of up to 16 bytes.
namespace colt5::cuda {

/// `count` consecutive elements, loaded and stored by as few instructions as possible: one for up to 16 bytes.
template <typename T, int count>
struct alignas(sizeof(T) * count < 16 ? sizeof(T) * count : 16) Pack {
    T values[count];
};

/// The number of elements in 16 bytes.
template <typename T>
inline constexpr int pack_size = 16 / static_cast<int>(sizeof(T));

/// x, or 0 where it is not finite.
template <typename T>
__device__ T finite_or_zero(const T& x) {
    return ::isfinite(static_cast<accumulate_t<T>>(x)) ? x : T(0);
}
template <typename T, int count>
__device__ Pack<T, count> finite_or_zero(Pack<T, count> pack) {
#pragma unroll
    for (int i = 0; i < count; ++i) pack.values[i] = finite_or_zero(pack.values[i]);
    return pack;
}
/// Whether a token is padding: there is a mask, and it is false. Kernels clean padding as they read it.
__device__ inline bool is_padding(const bool* mask, Index token) {
    return mask != nullptr && !mask[token];
}

/// Whether consecutive rows of `length` elements, from each of the addresses on, can be accessed in packs of 16 bytes.
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

/// A grid-stride loop over `size` elements. It calls body(i, width) for the pack of elements from i on, and
/// body(i, 1) for single elements at the end; without `packed`, for single elements only. Widths are compile-time
/// constants.
template <int width, typename Body>
__device__ void for_each_pack(Index size, bool packed, Body&& body) {
    const Index packs = packed ? size / width : 0;
#pragma unroll 2
    for (Index i = global_thread(); i < packs; i += all_threads())
        body(i * width, std::integral_constant<int, width>());
    for (Index i = packs * width + global_thread(); i < size; i += all_threads())
        body(i, std::integral_constant<int, 1>());
}

/// Calls body(width) with the width of the packs in which rows of d elements can be accessed, as a compile-time
/// constant.
template <typename T, typename Body, typename... Pointers>
void with_pack_size(Index d, Body&& body, const Pointers*... rows) {
    if (fits_packs<T>(d, rows...))
        body(std::integral_constant<int, pack_size<T>>());
    else
        body(std::integral_constant<int, 1>());
}

}  // namespace colt5::cuda
