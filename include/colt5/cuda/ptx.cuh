// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include <cuda.h>

#include <colt5/core/scalar.hpp>
#include <colt5/cuda/policy.cuh>

/// Instructions that CUDA C++ has no functions for, one function for each. The PTX ISA describes them.
namespace colt5::cuda {

/// Two floats of a pair of 16-bit numbers, the first of which is in the lower bits.
template <HalfPrecision T>
__device__ inline float2 unpack_pair(std::uint32_t pair) {
    if constexpr (std::is_same_v<T, bfloat16>)
        return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
    float2 values;
    asm("{\n.reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\n"
        "cvt.f32.f16 %1, high;\n}\n"
        : "=f"(values.x), "=f"(values.y)
        : "r"(pair));
    return values;
}
/// The inverse: rounds two floats to a pair.
template <HalfPrecision T>
__device__ inline std::uint32_t pack_pair(float low, float high) {
    std::uint32_t pair;
    if constexpr (std::is_same_v<T, bfloat16>)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/// The address that PTX instructions take.
__device__ inline unsigned shared_address(const void* data) {
    return static_cast<unsigned>(__cvta_generic_to_shared(data));
}

/// Starts copying 16 bytes from global memory, or zeros unless `real`.
__device__ inline void copy_16_bytes(void* shared, const void* from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(from),
                 "r"(real ? 16 : 0)
                 : "memory");
}
/// The same for one float.
__device__ inline void copy_float(float* shared, const float* from, bool real) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(from),
                 "r"(real ? 4 : 0)
                 : "memory");
}
/// Ends a group of this thread's copies.
__device__ inline void end_copy_group() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits until at most `groups` of this thread's copy groups are pending.
template <int groups>
__device__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

}  // namespace colt5::cuda

/// Those of compute capability 9.0a: barriers in shared memory (mbarrier), bulk copies by the tensor memory accelerator
/// (TMA), and matrix products of a warpgroup (wgmma). Compiled for another architecture, the functions do nothing.
namespace colt5::cuda::hopper {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define COLT5_HOPPER 1
#endif

/// The launch bound of a kernel of `threads` threads that only compute capability 9.0a has. Compiled for another
/// architecture it is too small, by which runs_on knows.
#if defined(COLT5_HOPPER) || !defined(__CUDA_ARCH__)
template <int threads>
inline constexpr int launch_bound = threads;
#else
template <int threads>
inline constexpr int launch_bound = 32;
#endif
/// Whether the policy's device runs code of such a kernel that was compiled for 9.0a.
template <typename... Parameters>
bool runs_on(const Cuda& policy, void (*kernel)(Parameters...), int threads) {
    const DeviceGuard guard(policy.device());
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    return attributes.maxThreadsPerBlock >= threads;
}

/// A barrier in shared memory (mbarrier). A phase is complete after all arrivals and after all expected bytes.
struct Barrier {
    __device__ void init(unsigned arrivals) {
#if defined(COLT5_HOPPER)
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals));
#endif
    }
    __device__ void arrive() {
#if defined(COLT5_HOPPER)
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
#endif
    }
    /// Arrives, and adds to the bytes that the phase expects.
    __device__ void expect(unsigned bytes) {
#if defined(COLT5_HOPPER)
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                     : "memory");
#endif
    }
    /// Waits until the phase of this parity is complete.
    __device__ void wait(unsigned parity) {
#if defined(COLT5_HOPPER)
        asm volatile(
            "{\n.reg .pred done;\n"
            "again:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again;\n}\n" ::"r"(shared_address(this)),
            "r"(parity)
            : "memory");
#endif
    }

    std::uint64_t state;
};

/// Makes initialized barriers visible to TMA and to other blocks.
__device__ inline void fence_barrier_init() {
#if defined(COLT5_HOPPER)
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
/// Starts copying `bytes` consecutive bytes from global memory. The barrier counts them as they arrive.
__device__ inline void bulk_load(void* to, const void* from, unsigned bytes, Barrier& barrier) {
#if defined(COLT5_HOPPER)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(&barrier))
                 : "memory");
#endif
}
/// Starts copying the box of a tensor map at (column, row), in the layout of the map.
__device__ inline void tensor_load(void* to, const CUtensorMap& map, int column, int row, Barrier& barrier) {
#if defined(COLT5_HOPPER)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier))
        : "memory");
#endif
}
/// The same for the box of a map of four dimensions at (column, row, head, sequence).
__device__ inline void tensor_load(void* to, const CUtensorMap& map, int column, int row, int head, int sequence,
                                   Barrier& barrier) {
#if defined(COLT5_HOPPER)
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
        "[%6];" ::"r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(head), "r"(sequence), "r"(shared_address(&barrier))
        : "memory");
#endif
}
/// Starts copying a box from shared memory to a map of four dimensions at (column, row, head, sequence), except what
/// lies outside the tensor.
__device__ inline void tensor_store(const CUtensorMap& map, const void* from, int column, int row, int head,
                                    int sequence) {
#if defined(COLT5_HOPPER)
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(shared_address(from)), "r"(column), "r"(row), "r"(head), "r"(sequence)
                 : "memory");
#endif
}
/// Commits this thread's tensor_stores since the last call as one group.
__device__ inline void commit_stores() {
#if defined(COLT5_HOPPER)
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}
/// Waits until all but `pending` groups of this thread's tensor_stores have read shared memory.
template <int pending = 0>
__device__ inline void wait_for_reads_of_stores() {
#if defined(COLT5_HOPPER)
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
#endif
}
/// A barrier of `threads` threads; numbers 1 to 15, since __syncthreads has 0.
template <int threads>
__device__ inline void sync_some(int number) {
#if defined(COLT5_HOPPER)
    asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(threads) : "memory");
#endif
}
/// Stores four 8 × 8 matrices of 16-bit numbers to shared memory. Lane 8 i + r gives the address of row r of matrix i,
/// and each lane has two entries of each matrix, laid out as the accumulators of `product`.
__device__ inline void store_matrices(unsigned address, std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                      std::uint32_t d) {
#if defined(COLT5_HOPPER)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
#endif
}
/// Makes this thread's ordinary stores to shared memory visible to wgmma and TMA.
__device__ inline void fence_shared_stores() {
#if defined(COLT5_HOPPER)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
/// The wgmma descriptor of a matrix in shared memory. Its rows have 128 bytes and follow each other. The 16-byte units
/// of a row are swizzled as TMA does it (CU_TENSOR_MAP_SWIZZLE_128B): unit u of row r lies at u ^ (r % 8). The first
/// row is at a multiple of 1024 bytes. To advance 32 bytes along the rows, add 2 to the descriptor; to advance 16 rows,
/// add 128.
__device__ inline std::uint64_t matrix_descriptor(const void* shared) {
    constexpr std::uint64_t group_stride = std::uint64_t{1024 >> 4} << 32, swizzle_128 = std::uint64_t{1} << 62;
    return swizzle_128 | group_stride | (std::uint64_t{1} << 16) | ((shared_address(shared) & 0x3FFFFu) >> 4);
}

/// Orders earlier accesses of registers and shared memory before the next product.
__device__ inline void fence_products() {
#if defined(COLT5_HOPPER)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
/// Commits the products since the last call as one group.
__device__ inline void commit_products() {
#if defined(COLT5_HOPPER)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
/// Waits until at most `pending` groups of products are pending.
template <int pending>
__device__ inline void wait_products() {
#if defined(COLT5_HOPPER)
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#endif
}
/// Sets the number of registers of each thread of this warpgroup.
template <int registers>
__device__ inline void lower_registers() {
#if defined(COLT5_HOPPER)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}
/// The same. Waits until other warpgroups have given up as many.
template <int registers>
__device__ inline void raise_registers() {
#if defined(COLT5_HOPPER)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}

#define COLT5_EIGHT(i)                                                                                          \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define COLT5_32 COLT5_EIGHT(0), COLT5_EIGHT(8), COLT5_EIGHT(16), COLT5_EIGHT(24)
#define COLT5_128                                                                                             \
    COLT5_EIGHT(0), COLT5_EIGHT(8), COLT5_EIGHT(16), COLT5_EIGHT(24), COLT5_EIGHT(32), COLT5_EIGHT(40),       \
        COLT5_EIGHT(48), COLT5_EIGHT(56), COLT5_EIGHT(64), COLT5_EIGHT(72), COLT5_EIGHT(80), COLT5_EIGHT(88), \
        COLT5_EIGHT(96), COLT5_EIGHT(104), COLT5_EIGHT(112), COLT5_EIGHT(120)
#define COLT5_NAMES_32                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define COLT5_NAMES_128                                                                            \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define COLT5_PRODUCT(columns, types, names, predicate, operands)   \
    "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " predicate \
    ", 0;\n"                                                        \
    "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." types " {" names "}, " operands ";\n}\n"

/// d (64, 256) = a (64, 16) · b (256, 16)ᵀ, or += if `accumulate`, of 16-bit numbers with sums in float. Thread t of
/// the warpgroup has two rows of d: 16 (t / 32) + t % 32 / 4, and the row 8 below. In columns 8 j + 2 (t % 4) and the
/// next it has d[4 j], d[4 j + 1] of the upper row, and d[4 j + 2], d[4 j + 3] of the lower row.
template <HalfPrecision T>
__device__ inline void product(float (&d)[128], std::uint64_t a, std::uint64_t b, bool accumulate) {
#if defined(COLT5_HOPPER)
    const int add = accumulate;
    if constexpr (std::is_same_v<T, bfloat16>)
        asm volatile(COLT5_PRODUCT("256", "bf16.bf16", COLT5_NAMES_128, "%130", "%128, %129, accumulate, 1, 1, 0, 0")
                     : COLT5_128
                     : "l"(a), "l"(b), "r"(add));
    else
        asm volatile(COLT5_PRODUCT("256", "f16.f16", COLT5_NAMES_128, "%130", "%128, %129, accumulate, 1, 1, 0, 0")
                     : COLT5_128
                     : "l"(a), "l"(b), "r"(add));
#endif
}
/// The same for d (64, 64) and b (64, 16), with a in registers, in pairs. They have the layout of the accumulators d
/// above, from column 16 k on: (d[8 k], d[8 k + 1]), (d[8 k + 2], d[8 k + 3]), … With `transpose_b`, b is 16 rows of a
/// tile of 64 × 64 numbers, which are bᵀ (16, 64).
template <HalfPrecision T, bool transpose_b = false>
__device__ inline void product(float (&d)[32], const std::uint32_t* a, std::uint64_t b, bool accumulate) {
#if defined(COLT5_HOPPER)
    const int add = accumulate;
    constexpr int of_b = transpose_b;
    if constexpr (std::is_same_v<T, bfloat16>)
        asm volatile(
            COLT5_PRODUCT("64", "bf16.bf16", COLT5_NAMES_32, "%37", "{%32, %33, %34, %35}, %36, accumulate, 1, 1, %38")
            : COLT5_32
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(of_b));
    else
        asm volatile(
            COLT5_PRODUCT("64", "f16.f16", COLT5_NAMES_32, "%37", "{%32, %33, %34, %35}, %36, accumulate, 1, 1, %38")
            : COLT5_32
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(of_b));
#endif
}

/// The same for d (64, 64) with both operands in shared memory. Each is 16 columns of a tile of 64 × 64 numbers, or
/// with `transpose_a` or `transpose_b` 16 rows of one, which are aᵀ or bᵀ (16, 64).
template <HalfPrecision T, bool transpose_a, bool transpose_b>
__device__ inline void product_64(float (&d)[32], std::uint64_t a, std::uint64_t b, bool accumulate) {
#if defined(COLT5_HOPPER)
    const int add = accumulate;
    constexpr int of_a = transpose_a, of_b = transpose_b;
    if constexpr (std::is_same_v<T, bfloat16>)
        asm volatile(COLT5_PRODUCT("64", "bf16.bf16", COLT5_NAMES_32, "%34", "%32, %33, accumulate, 1, 1, %35, %36")
                     : COLT5_32
                     : "l"(a), "l"(b), "r"(add), "n"(of_a), "n"(of_b));
    else
        asm volatile(COLT5_PRODUCT("64", "f16.f16", COLT5_NAMES_32, "%34", "%32, %33, accumulate, 1, 1, %35, %36")
                     : COLT5_32
                     : "l"(a), "l"(b), "r"(add), "n"(of_a), "n"(of_b));
#endif
}
/// Tells the compiler that a product, which has been waited for, has written d.
template <int count>
__device__ inline void expect_written(float (&d)[count]) {
#pragma unroll
    for (float& value : d) asm volatile("" : "+f"(value)::"memory");
}

#undef COLT5_PRODUCT
#undef COLT5_NAMES_128
#undef COLT5_NAMES_32
#undef COLT5_128
#undef COLT5_32
#undef COLT5_EIGHT

/// The TMA tensor map of a tensor in global memory, of `size[0]` consecutive numbers and, in its other dimensions,
/// `stride` numbers from each to the next. Its boxes are `box_rows` rows of 128 bytes, swizzled as for
/// matrix_descriptor. Entries outside the tensor are read as zeros.
template <HalfPrecision T, std::size_t dims>
CUtensorMap tensor_map(const T* data, const std::array<Index, dims>& size, const std::array<Index, dims - 1>& stride,
                       int box_rows) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found{};
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
              "cudaGetDriverEntryPointByVersion");
        if (found != cudaDriverEntryPointSuccess) throw CudaError("colt5: this driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<Encode>(entry);
    }();
    CUtensorMap map{};
    cuuint64_t sizes[dims], strides[dims - 1];
    cuuint32_t box[dims], step[dims];
    for (std::size_t i = 0; i < dims; ++i) {
        sizes[i] = static_cast<cuuint64_t>(size[i]);
        if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(stride[i - 1]) * sizeof(T);
        box[i] = i == 0 ? 128 / sizeof(T) : i == 1 ? static_cast<cuuint32_t>(box_rows) : 1;
        step[i] = 1;
    }
    const CUresult status = encode(
        &map, std::is_same_v<T, bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        static_cast<cuuint32_t>(dims), const_cast<T*>(data), sizes, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) throw CudaError("colt5: cuTensorMapEncodeTiled failed: code " + std::to_string(status));
    return map;
}

}  // namespace colt5::cuda::hopper
