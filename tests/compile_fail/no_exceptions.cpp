// SPDX-License-Identifier: MIT
// expect: colt5: reports errors by exceptions: compile without -fno-exceptions
// flags: -fno-exceptions
#include <colt5/colt5.hpp>
