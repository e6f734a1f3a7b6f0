// SPDX-License-Identifier: MIT
// Compiles with the flags that colt5's headers for nvcc need, and links with cuBLASLt. Needs no GPU.
#include <cublasLt.h>
#include <colt5/core/random.hpp>
#include <colt5/cuda/policy.cuh>
#include <cstdio>

__global__ void draw(float* out) {
    *out = colt5::Random(colt5::Seed{1}).normal(0);
}

int main() {
    std::printf("cuBLASLt %zu\n", cublasLtGetVersion());
    return cublasLtGetVersion() == 0;
}
