// SPDX-License-Identifier: MIT
#pragma once

// The library with its backend: g++ compiles the program for the CPU, nvcc the one for the GPU.
#if defined(__CUDACC__)
#include <colt5/cuda.cuh>
#else
#include <colt5/colt5.hpp>
#endif
