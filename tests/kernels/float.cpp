// SPDX-License-Identifier: MIT
#include <colt5/kernels.hpp>
