// SPDX-License-Identifier: MIT
#pragma once

// The only macros of the library: functions that run on the host and, when nvcc compiles them, on the device too.
#if defined(__CUDACC__)
#define COLT5_HOST_DEVICE __host__ __device__
#else
#define COLT5_HOST_DEVICE
#endif
