// SPDX-License-Identifier: MIT
// The cases in float, compiled by the C++ compiler: it sees only declarations of the kernels, which kernels.cu has.
// Those of expressions of their own are left out: nvcc must compile them.
#include <cuda_runtime.h>

#include <colt5/cuda.cuh>

#include <algorithm>
#include <cmath>
#include <cstdio>

#define CASES_WITHOUT_OWN_EXPRESSIONS
#include "../all_cases.hpp"

#ifndef CASES_SCALAR
#define CASES_SCALAR float
#endif

int main() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::puts("skipped: there is no GPU");
        return 0;
    }
    const auto cpu = cases::on_cpu();
    int wrong = 0;
    for (const auto& of_gpu : cases::all_cases<CASES_SCALAR>([](const cases::Setting&) { return colt5::Cuda(); })) {
        const auto same = std::find_if(cpu.begin(), cpu.end(), [&](const auto& c) { return c.name == of_gpu.name; });
        const cases::Setting setting{cases::Precision::fp32, 0};
        const auto expected = same->run(setting);
        for (const auto& [name, result] : of_gpu.run(setting)) {
            const auto& wanted = expected.at(name).values;
            double squares = 0, difference = 0;
            for (std::size_t i = 0; i < wanted.size(); ++i) {
                squares += wanted[i] * wanted[i];
                difference += (result.values[i] - wanted[i]) * (result.values[i] - wanted[i]);
            }
            if (std::sqrt(difference) <= 2e-5 * std::sqrt(squares)) continue;
            std::printf("%s, %s: %g of %g\n", of_gpu.name.c_str(), name.c_str(), std::sqrt(difference),
                        std::sqrt(squares));
            ++wrong;
        }
    }
    std::printf("%d wrong\n", wrong);
    return wrong == 0 ? 0 : 1;
}
