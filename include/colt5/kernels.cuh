// SPDX-License-Identifier: MIT
#pragma once

/// All kernels of the GPU for one scalar type: float, double, bfloat16 or float16. Include it in one translation unit
/// for nvcc, which needs nothing else; any compiler can compile the others (see cuda.cuh). Kernels of routers and of
/// float gradients come with float and double: a program in bfloat16 or float16 also needs a file of float.
///
///     #define COLT5_KERNEL_SCALAR bfloat16   // float if it is not defined
///     #include <colt5/kernels.cuh>

#if defined(COLT5_DECLARE_KERNELS)
#undef COLT5_DECLARE_KERNELS
#endif
#include <colt5/cuda.cuh>

#ifndef COLT5_KERNEL_SCALAR
#define COLT5_KERNEL_SCALAR float
#endif
#define COLT5_HALF_PRECISION_bfloat16 1
#define COLT5_HALF_PRECISION_float16 1
#define COLT5_CONCATENATE(a, b) a##b
#define COLT5_HALF_PRECISION(type) COLT5_CONCATENATE(COLT5_HALF_PRECISION_, type)
#if COLT5_HALF_PRECISION(COLT5_KERNEL_SCALAR)
#define COLT5_KERNELS_OF_LOGITS 0
#else
#define COLT5_KERNELS_OF_LOGITS 1
#endif

namespace colt5 {

namespace {
using KernelScalar = COLT5_KERNEL_SCALAR;
using KernelSum = accumulate_t<KernelScalar>;
}  // namespace

#include <colt5/cuda/expressions.inc>
#include <colt5/cuda/instances.inc>
#define COLT5_KERNEL_HEAD dynamic
#include <colt5/cuda/instances_of_attention.inc>
#undef COLT5_KERNEL_HEAD
#define COLT5_KERNEL_HEAD 32
#include <colt5/cuda/instances_of_attention.inc>
#undef COLT5_KERNEL_HEAD
#define COLT5_KERNEL_HEAD 64
#include <colt5/cuda/instances_of_attention.inc>
#undef COLT5_KERNEL_HEAD
#define COLT5_KERNEL_HEAD 128
#include <colt5/cuda/instances_of_attention.inc>
#undef COLT5_KERNEL_HEAD
#if COLT5_KERNELS_OF_LOGITS
#include <colt5/cuda/instances_of_logits.inc>
#else
#include <colt5/cuda/instances_of_half.inc>
#endif

}  // namespace colt5
