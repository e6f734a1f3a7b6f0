// SPDX-License-Identifier: MIT
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <source_location>
#include <string>

#include <colt5/core/error.hpp>

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
inline void check(cublasStatus_t status, const char* call,
                  const std::source_location& at = std::source_location::current()) {
    if (status != CUBLAS_STATUS_SUCCESS) fail(call, cublasLtGetStatusString(status), at);
}

/// After a launch: throws if the kernel could not be started.
inline void check_launch(const char* kernel, const std::source_location& at = std::source_location::current()) {
    check(cudaGetLastError(), kernel, at);
}

}  // namespace cuda

}  // namespace colt5
