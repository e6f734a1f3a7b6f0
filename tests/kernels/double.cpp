// SPDX-License-Identifier: MIT
#define COLT5_KERNEL_SCALAR double
#include <colt5/kernels.hpp>
