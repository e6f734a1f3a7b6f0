// SPDX-License-Identifier: MIT
#include <colt5/core/random.hpp>

colt5::Index size_in_two();

int main() {
    const colt5::VectorTensor<float, colt5::Cpu> vector(colt5::Cpu{1}, {3});
    return vector.size() == size_in_two() ? 0 : 1;
}
