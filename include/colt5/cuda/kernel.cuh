// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <mutex>
#include <source_location>
#include <string>
#include <type_traits>

#include <colt5/core/scalar.hpp>
#include <colt5/cuda/policy.cuh>

/// What kernels are written with: launches and grids, numbers of threads, reductions and scans over warps and blocks in
/// a fixed order, rows in packs of up to 16 bytes, and which tokens are padding.
namespace colt5::cuda {

/// After a launch: throws if the kernel could not be started.
inline void check_launch(const char* kernel, const std::source_location& at = std::source_location::current()) {
    check(cudaGetLastError(), kernel, at);
}

/// Held from setting a kernel's limit of dynamic shared memory, which all threads share, until the launch.
inline std::mutex& shared_bytes_mutex() {
    static std::mutex mutex;
    return mutex;
}

/// Starts `kernel` on the policy's stream; does nothing when there are no blocks.
template <typename... Parameters, typename... Arguments>
void launch(const Cuda& policy, const char* name, void (*kernel)(Parameters...), dim3 blocks, int threads,
            std::size_t shared_bytes, const Arguments&... arguments) {
    if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
    const DeviceGuard guard(policy.device());
    std::unique_lock lock(shared_bytes_mutex(), std::defer_lock);
    if (shared_bytes > 48 * 1024) {
        lock.lock();
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
              name);
    }
    kernel<<<blocks, static_cast<unsigned>(threads), shared_bytes, policy.stream()>>>(arguments...);
    check_launch(name);
}

/// The number of multiprocessors of the policy's device.
inline int multiprocessors(const Cuda& policy) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, policy.device()), "cudaDeviceGetAttribute");
    return count;
}

/// The largest number of blocks of a launch, all in the first dimension; the other dimensions are limited to 65,535.
inline constexpr Index max_blocks = std::numeric_limits<std::int32_t>::max();

inline dim3 grid(Index blocks) {
    expect_value(blocks <= max_blocks, "blocks of a kernel", "at most 2147483647 on a GPU", blocks);
    return dim3(static_cast<unsigned>(blocks));
}
/// A grid of `blocks_each` blocks for each of `rows` rows. The kernel finds its row and block by RowBlock.
inline dim3 grid_of_rows(Index rows, Index blocks_each) {
    if (rows > 0 && blocks_each > max_blocks / rows)
        expect_value(
            false, "blocks of a kernel",
            colt5::detail::concat({"at most 2147483647 on a GPU, in rows times ", std::to_string(blocks_each)}), rows);
    return grid(rows * blocks_each);
}
/// The grid of a grid-stride loop over `count` items: at most so many blocks that they fill an H100 several times.
inline dim3 blocks_for(Index count, int threads) {
    constexpr Index max_in_grid = 132 * 16;
    return grid(std::min(max_in_grid, divide_up(count, threads)));
}

inline constexpr int warp_size = 32;

/// The row of a block of grid_of_rows, and its number among the blocks of the row.
struct RowBlock {
    unsigned row, block;

    __device__ explicit RowBlock(Index blocks_each) {
        const auto each = static_cast<unsigned>(blocks_each);
        row = blockIdx.x / each;
        block = blockIdx.x - row * each;
    }
};

__device__ inline Index global_thread() {
    return static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline Index grid_threads() {
    return static_cast<Index>(gridDim.x) * blockDim.x;
}

/// a / b of non-negative numbers, by a division of 32 bits where possible: divisions of 64 bits are slow.
__device__ inline Index quotient(Index a, Index b) {
    if ((a | b) >> 32 == 0) return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
    return a / b;
}

/// The lane of the calling thread in its warp.
__device__ inline int lane_id() {
    return static_cast<int>(threadIdx.x) % warp_size;
}

struct Plus {
    template <typename T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
};
struct Greater {
    template <typename T>
    __device__ T operator()(T a, T b) const {
        return a > b ? a : b;
    }
};

/// The greater one; NaN if one of them is.
struct GreaterOrNan {
    template <typename T>
    __device__ T operator()(T a, T b) const {
        return a > b || a != a ? a : b;
    }
};

struct Smaller {
    template <typename T>
    __device__ T operator()(T a, T b) const {
        return a < b ? a : b;
    }
};

/// Reduces the values of a warp. Every lane gets the result.
template <typename T, typename Combine>
__device__ T warp_reduce(T value, Combine combine) {
    for (int offset = warp_size / 2; offset > 0; offset /= 2)
        value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
    return value;
}
template <typename T>
__device__ T warp_sum(T value) {
    return warp_reduce(value, Plus());
}
template <typename T>
__device__ T warp_max(T value) {
    return warp_reduce(value, Greater());
}

/// Reduces the values of a block of up to 1024 threads, a multiple of 32. Every thread gets the result. All threads
/// must call it; `identity` is the identity element of `combine`.
template <typename T, typename Combine>
__device__ T block_reduce(T value, T identity, Combine combine) {
    __shared__ T warp_values[warp_size];
    const int warp = static_cast<int>(threadIdx.x) / warp_size, lane = lane_id();
    const int warps = static_cast<int>(blockDim.x) / warp_size;
    value = warp_reduce(value, combine);
    __syncthreads();  // warp_values may still be read from a call before
    if (lane == 0) warp_values[warp] = value;
    __syncthreads();
    return warp_reduce(lane < warps ? warp_values[lane] : identity, combine);
}
template <typename T>
__device__ T block_sum(T value) {
    return block_reduce(value, T(0), Plus());
}
template <typename T>
__device__ T block_max(T value) {
    return block_reduce(value, -std::numeric_limits<T>::infinity(), Greater());
}

/// The values of the lanes up to this one, combined.
template <typename T, typename Combine>
__device__ T warp_inclusive_scan(T value, Combine combine) {
    const int lane = lane_id();
    for (int offset = 1; offset < warp_size; offset *= 2) {
        const T before = __shfl_up_sync(0xffffffffu, value, offset);
        if (lane >= offset) value = combine(value, before);
    }
    return value;
}

/// Σ of the values of the threads up to this one. All threads of the block call it.
template <int threads, typename T>
__device__ T block_inclusive_sum(T value) {
    constexpr int warps = threads / warp_size;
    __shared__ T warp_values[warps];
    const int warp = static_cast<int>(threadIdx.x) / warp_size, lane = lane_id();
    value = warp_inclusive_scan(value, Plus());
    __syncthreads();  // warp_values may still be read from a call before
    if (lane == warp_size - 1) warp_values[warp] = value;
    __syncthreads();
    const T warp_totals = warp_inclusive_scan(warp_values[lane % warps], Plus());
    const T before = __shfl_sync(0xffffffffu, warp_totals, ::max(warp - 1, 0));
    return warp > 0 ? before + value : value;
}

/// `count` consecutive elements, loaded and stored by as few instructions as possible: one for up to 16 bytes.
template <typename T, int count>
struct alignas(sizeof(T) * count < 16 ? sizeof(T) * count : 16) Pack {
    T values[count];
};

/// The number of elements in 16 bytes.
template <typename T>
inline constexpr int pack_size = 16 / static_cast<int>(sizeof(T));

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

/// The mask (b, n) as rows of logits (b, r, n) have it: the r rows of a sequence share its mask.
class RowMask {
public:
    /// `mask` may be null. Entry i is that of token `begin` + i of row `row`.
    __device__ RowMask(const bool* mask, Index row, Index routes, Index length, Index begin = 0)
        : real_(mask != nullptr ? mask + row / routes * length + begin : nullptr) {}
    /// The entries of the row, or null.
    __device__ const bool* data() const { return real_; }
    /// Whether a token is real, not masked.
    __device__ bool operator[](Index i) const { return real_ == nullptr || real_[i]; }

private:
    const bool* real_;
};

/// A grid-stride loop over `size` elements. It calls body(i, width) for the pack of elements from i on, and
/// body(i, 1) for single elements at the end; without `packed`, for single elements only. Widths are compile-time
/// constants.
template <int width, typename Body>
__device__ void for_each_pack(Index size, bool packed, Body&& body) {
    const Index packs = packed ? size / width : 0;
#pragma unroll 2
    for (Index i = global_thread(); i < packs; i += grid_threads())
        body(i * width, std::integral_constant<int, width>());
    for (Index i = packs * width + global_thread(); i < size; i += grid_threads())
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

/// A row of d entries, distributed over the lanes of a warp in packs of `width` entries. Each lane loads its `packs`
/// packs into registers at once, so that their latencies overlap. With packs = 0 the row may have any length, and is
/// loaded again by each loop. In a row of padding, values that are not finite count as 0.
template <typename T, int width, int packs>
class WarpRow {
public:
    __device__ WarpRow(const T* row, Index d, bool padding = false) : d_(d) {
#pragma unroll
        for (int i = 0; i < packs; ++i)
            if (column(i) < d) packs_[i] = load_pack<width>(row + column(i));
        if (!padding) return;
#pragma unroll
        for (int i = 0; i < packs; ++i) packs_[i] = finite_or_zero(packs_[i]);
    }
    /// Calls body(j, pack) for each of the lane's packs, where j is the column of its first entry.
    template <typename Body>
    __device__ void for_each(const Body& body) const {
#pragma unroll
        for (int i = 0; i < packs; ++i)
            if (column(i) < d_) body(column(i), packs_[i]);
    }
    /// Calls body(i, j, pack, packs of the other rows...), where i is the number of the pack.
    template <typename Body, typename... Others>
    __device__ void for_each_with(const Body& body, const Others&... others) const {
#pragma unroll
        for (int i = 0; i < packs; ++i)
            if (column(i) < d_) body(i, column(i), packs_[i], others.packs_[i]...);
    }

private:
    __device__ static Index column(int i) {
        return (lane_id() + i * warp_size) * width;
    }
    Index d_;
    Pack<T, width> packs_[packs];
};

template <typename T, int width>
class WarpRow<T, width, 0> {
public:
    __device__ WarpRow(const T* row, Index d, bool padding = false) : row_(row), d_(d), padding_(padding) {}
    template <typename Body>
    __device__ void for_each(const Body& body) const {
        for (Index j = first(); j < d_; j += warp_size * width) body(j, pack(j));
    }
    template <typename Body, typename... Others>
    __device__ void for_each_with(const Body& body, const Others&... others) const {
        for (Index j = first(); j < d_; j += warp_size * width) body(0, j, pack(j), others.pack(j)...);
    }

private:
    __device__ static Index first() { return lane_id() * width; }
    __device__ Pack<T, width> pack(Index j) const {
        const auto as_it_is = load_pack<width>(row_ + j);
        return padding_ ? finite_or_zero(as_it_is) : as_it_is;
    }
    const T* row_;
    Index d_;
    bool padding_;
};

/// Calls run.template operator()<width, packs>() with the template arguments of WarpRow for consecutive rows of d
/// entries from each of the addresses on.
template <typename T, typename Run, typename... Pointers>
void with_warp_row(Index d, const Run& run, const Pointers*... rows) {
    constexpr int width = pack_size<T>;
    if (!fits_packs<T>(d, rows...))
        run.template operator()<1, 0>();
    else if (d <= 2 * warp_size * width)
        run.template operator()<width, 2>();
    else if (d <= 4 * warp_size * width)
        run.template operator()<width, 4>();
    else if (d <= 8 * warp_size * width)
        run.template operator()<width, 8>();
    else
        run.template operator()<width, 0>();
}

}  // namespace colt5::cuda
