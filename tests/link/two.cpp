// SPDX-License-Identifier: MIT
#include <colt5/core/random.hpp>

colt5::Index size_in_two();

colt5::Index size_in_two() { return colt5::VectorTensor<float, colt5::Cpu>(colt5::Cpu{1}, {3}).size(); }
