// SPDX-License-Identifier: MIT
#pragma once

// The library with the backend of the compiler: g++ makes the program for the CPU, nvcc that for the GPU.
#if defined(__CUDACC__)
#include <colt5/cuda.cuh>
#else
#include <colt5/colt5.hpp>
#endif
