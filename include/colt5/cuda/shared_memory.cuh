// SPDX-License-Identifier: MIT
#pragma once

/// Addresses in shared memory, and asynchronous copies into it (cp.async).
namespace colt5::cuda {

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
