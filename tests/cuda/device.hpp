// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda.cuh>

#include <vector>

#include "all_cases.hpp"
#include "goldens.hpp"
#include "runners.hpp"

/// All cases and all golden files on the GPU, for the file of each scalar type.
namespace cases {

inline Cuda cuda_policy(Precision precision, const MemoryPlan& plan) {
    return Cuda({.math = precision == Precision::tf32 ? MathMode::tf32 : MathMode::fp32,
                 .memory_plan = plan,
                 .allocations = !sanitized()       ? Allocations::together
                                : sanitized("nan") ? Allocations::separate_with_nan
                                                   : Allocations::separate});
}

template <typename T>
std::vector<Case> all_cases_on_cuda() {
    return all_cases<T>([](const Setting& setting) {
        const bool in_parts = setting.seed / 2 % 2 == 1;
        return cuda_policy(setting.precision, in_parts ? MemoryPlan{.tokens_at_a_time = 100, .recompute = true}
                                                       : Cuda::Options().memory_plan);
    });
}

template <typename T>
std::vector<Golden> all_goldens_on_cuda() {
    std::vector<Golden> all;
    for (const auto& runner : golden::runners<T, Cuda>())
        all.push_back({runner.name, runner.path, runner.by_cosine,
                       [runner](Precision precision, golden::File& file, const golden::Variation& variation) {
                           return runner.run(cuda_policy(precision, Cuda::Options().memory_plan), file, variation);
                       }});
    return all;
}

}  // namespace cases
