// SPDX-License-Identifier: MIT
// A program that knows nothing but the installed library.
#include <colt5/core/tensor.hpp>
#include <cstdio>

int main() {
    colt5::TokensTensor<float, colt5::Cpu> tokens(colt5::Cpu{1}, {2, 8, 4});
    std::printf("%td values\n", tokens.size());
    return tokens.size() == 64 ? 0 : 1;
}
