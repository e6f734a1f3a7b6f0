// SPDX-License-Identifier: MIT
#pragma once

/// All kernels of the CPU for one scalar type, float or double. Include it in one translation unit of a program, which
/// needs nothing else. The others define COLT5_DECLARE_KERNELS, best on the compiler's command line.
///
///     #define COLT5_KERNEL_SCALAR double   // float if it is not defined
///     #include <colt5/kernels.hpp>

#if defined(COLT5_DECLARE_KERNELS)
#undef COLT5_DECLARE_KERNELS
#endif
#include <colt5/cpu.hpp>

#ifndef COLT5_KERNEL_SCALAR
#define COLT5_KERNEL_SCALAR float
#endif

namespace colt5 {

namespace {
using KernelScalar = COLT5_KERNEL_SCALAR;
using KernelSum = accumulate_t<KernelScalar>;
}  // namespace

#include <colt5/cpu/instances.inc>
#include <colt5/cpu/instances_of_logits.inc>

}  // namespace colt5
