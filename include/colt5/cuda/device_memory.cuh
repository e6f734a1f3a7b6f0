// SPDX-License-Identifier: MIT
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

#include <colt5/core/allocations.hpp>
#include <colt5/core/error.hpp>
#include <colt5/core/view.hpp>
#include <colt5/core/workspace.hpp>

/// A device's memory, and errors of CUDA's calls.
namespace colt5 {

/// A call of CUDA or cuBLAS failed. The message has the call, the file, the line and the library's description of the
/// error.
class CudaError : public Error {
public:
    using Error::Error;
};

namespace cuda {

[[noreturn]] inline void fail(const char* call, const char* reason, const std::source_location& at) {
    throw CudaError(colt5::detail::concat(
        {"colt5: ", call, " failed: ", reason, " (", at.file_name(), ":", std::to_string(at.line()), ")"}));
}

/// Throws CudaError unless the call succeeded: check(cudaStreamCreate(&stream), "cudaStreamCreate").
inline void check(cudaError_t status, const char* call,
                  const std::source_location& at = std::source_location::current()) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // clears the error, which the next launch would report again
    fail(call, cudaGetErrorString(status), at);
}

/// Makes a device current for the lifetime of the guard.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&previous_), "cudaGetDevice");
        if (previous_ != device) check(cudaSetDevice(device), "cudaSetDevice");
        changed_ = previous_ != device;
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }

private:
    int previous_ = 0;
    bool changed_ = false;
};

/// The driver's functions that map memory. They are looked up at run time, so that programs need not link with the
/// driver.
struct Driver {
    decltype(&cuMemAddressReserve) reserve = find<decltype(&cuMemAddressReserve)>("cuMemAddressReserve");
    decltype(&cuMemAddressFree) free = find<decltype(&cuMemAddressFree)>("cuMemAddressFree");
    decltype(&cuMemGetAllocationGranularity) granularity =
        find<decltype(&cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity");
    decltype(&cuMemCreate) create = find<decltype(&cuMemCreate)>("cuMemCreate");
    decltype(&cuMemRelease) release = find<decltype(&cuMemRelease)>("cuMemRelease");
    decltype(&cuMemMap) map = find<decltype(&cuMemMap)>("cuMemMap");
    decltype(&cuMemUnmap) unmap = find<decltype(&cuMemUnmap)>("cuMemUnmap");
    decltype(&cuMemSetAccess) set_access = find<decltype(&cuMemSetAccess)>("cuMemSetAccess");

    static const Driver& get() {
        static const Driver driver;
        return driver;
    }

private:
    template <typename Function>
    static Function find(const char* name) {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result{};
        check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &result), name);
        if (function == nullptr) fail(name, "the driver has no such function", std::source_location::current());
        return reinterpret_cast<Function>(function);
    }
};

inline void check(CUresult status, const char* call, const std::source_location& at = std::source_location::current()) {
    if (status != CUDA_SUCCESS) fail(call, colt5::detail::concat({"error ", std::to_string(status)}).c_str(), at);
}

/// A range of a device's addresses, as large as the device's memory. Memory is mapped to the beginning of the range, at
/// least as much as `resize` was asked for.
class DeviceMemory {
public:
    DeviceMemory(int device, Allocations allocations) : device_(device), allocations_(allocations) {
        int devices = 0;
        check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
        if (device < 0 || device >= devices)
            expect_value(false, "device", colt5::detail::concat({"from 0 to ", std::to_string(devices - 1)}), device);
        const DeviceGuard guard(device);
        std::size_t free = 0;
        check(cudaMemGetInfo(&free, &capacity_), "cudaMemGetInfo");
        properties_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
        properties_.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
        properties_.location.id = device;
        check(Driver::get().granularity(&granularity_, &properties_, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
              "cuMemGetAllocationGranularity");
        capacity_ = round_up(capacity_);
        check(Driver::get().reserve(&begin_, capacity_, 0, 0, 0), "cuMemAddressReserve");
    }
    DeviceMemory(DeviceMemory&& other) noexcept
        : device_(other.device_),
          allocations_(other.allocations_),
          properties_(other.properties_),
          granularity_(other.granularity_),
          capacity_(other.capacity_),
          size_(std::exchange(other.size_, 0)),
          begin_(std::exchange(other.begin_, 0)),
          pieces_(std::move(other.pieces_)) {}
    DeviceMemory& operator=(DeviceMemory&&) = delete;
    ~DeviceMemory() {
        if (begin_ == 0) return;
        int current = 0;
        cudaGetDevice(&current);
        cudaSetDevice(device_);
        cudaDeviceSynchronize();  // no kernel may still use it
        while (!pieces_.empty()) unmap_last();
        Driver::get().free(begin_, capacity_);
        cudaSetDevice(current);
    }

    std::byte* begin() const { return reinterpret_cast<std::byte*>(begin_); }

    /// Maps or unmaps memory, so that the first `bytes` can be used. Throws OutOfMemory, and changes nothing then.
    void resize(std::size_t bytes) {
        const DeviceGuard guard(device_);
        const std::size_t end = round_up(bytes);
        if (end > size_) {
            grow_by(end - size_);
        } else if (!pieces_.empty() && size_ - pieces_.back().bytes >= end) {
            check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
            while (!pieces_.empty() && size_ - pieces_.back().bytes >= end) unmap_last();
        }
    }

    bool separate() const { return allocations_ != Allocations::together; }
    /// Allocates memory outside the range. Throws OutOfMemory.
    void* allocate(std::size_t bytes) const {
        const DeviceGuard guard(device_);
        void* data = nullptr;
        const cudaError_t status = cudaMalloc(&data, bytes);
        if (status == cudaErrorMemoryAllocation) {
            cudaGetLastError();  // clears the error, which the next launch would report otherwise
            fail_to_grow(bytes);
        }
        check(status, "cudaMalloc");
        if (allocations_ == Allocations::separate_with_nan) {
            try {
                check(cudaMemset(data, 0xFF, bytes), "cudaMemset");
                check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
            } catch (const CudaError&) {
                cudaFree(data);
                throw;
            }
        }
        return data;
    }
    void deallocate(void* data) const {
        int current = 0;
        cudaGetDevice(&current);
        cudaSetDevice(device_);
        cudaDeviceSynchronize();
        cudaFree(data);
        cudaSetDevice(current);
    }

private:
    struct Piece {
        CUmemGenericAllocationHandle handle;
        std::size_t bytes;
    };

    std::size_t round_up(std::size_t bytes) const { return colt5::round_up(bytes, granularity_); }
    void grow_by(std::size_t bytes) {
        Piece piece{0, bytes};
        pieces_.reserve(pieces_.size() + 1);
        if (bytes > capacity_ - size_) fail_to_grow(bytes);
        const CUresult created = Driver::get().create(&piece.handle, bytes, &properties_, 0);
        if (created == CUDA_ERROR_OUT_OF_MEMORY) fail_to_grow(bytes);
        check(created, "cuMemCreate");
        const CUresult mapped = Driver::get().map(begin_ + size_, bytes, 0, piece.handle, 0);
        if (mapped != CUDA_SUCCESS) Driver::get().release(piece.handle);
        check(mapped, "cuMemMap");
        pieces_.push_back(piece);
        size_ += bytes;
        CUmemAccessDesc access{};
        access.location = properties_.location;
        access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        const CUresult granted = Driver::get().set_access(begin_ + size_ - bytes, bytes, &access, 1);
        if (granted != CUDA_SUCCESS) unmap_last();
        check(granted, "cuMemSetAccess");
    }
    void unmap_last() {
        const Piece piece = pieces_.back();
        size_ -= piece.bytes;
        Driver::get().unmap(begin_ + size_, piece.bytes);
        Driver::get().release(piece.handle);
        pieces_.pop_back();
    }
    [[noreturn]] void fail_to_grow(std::size_t bytes) const {
        std::size_t free = 0, total = 0;
        cudaMemGetInfo(&free, &total);
        throw OutOfMemory(colt5::detail::concat({"colt5: out of memory on device ", std::to_string(device_),
                                                 ": a workspace of ", std::to_string(size_ >> 20), " MiB asked for ",
                                                 std::to_string(bytes >> 20), " MiB more, ", std::to_string(free >> 20),
                                                 " of ", std::to_string(total >> 20), " MiB are free"}));
    }

    int device_;
    Allocations allocations_;
    CUmemAllocationProp properties_{};
    std::size_t granularity_ = 0, capacity_ = 0, size_ = 0;
    CUdeviceptr begin_ = 0;
    std::vector<Piece> pieces_;
};

}  // namespace cuda

}  // namespace colt5
