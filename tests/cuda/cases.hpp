// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

/// The same computations on two policies: cpu.cpp and cuda.cu make them, compare.cpp holds the results against each
/// other.
namespace cases {

/// Results by name, in double whatever they were computed in.
using Results = std::map<std::string, std::vector<double>>;

enum class Precision { fp64, fp32, tf32 };

/// A computation on random shapes and values, which the seed decides.
struct Case {
    std::string name;
    std::function<Results(Precision, std::uint64_t seed)> run;
};

/// Whether there is a GPU.
bool has_gpu();

/// Whether forward and backward of a block, captured into a CUDA graph, give the same bits on new inputs as direct
/// calls do.
bool graph_gives_the_same_bits();

/// Requests to the system during a second forward and backward of the same shape.
std::size_t allocations_of_a_second_call();

/// In the same order.
std::vector<Case> on_cpu();
std::vector<Case> on_cuda();

}  // namespace cases
