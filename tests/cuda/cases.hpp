// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

/// The same computations on two policies: cpu.cpp makes them in double, a file for each scalar type on the GPU, and
/// compare.cpp holds the results against each other.
namespace cases {

enum class Precision { fp64, fp32, tf32, bf16, fp16 };

/// What one computed number may differ by.
enum class Kind {
    rounded,    ///< comes from values or products of the precision
    amplified,  ///< three times as much: differences or inner products of rounded results, whose terms cancel in part
    in_float,   ///< in float throughout unless the precision is double: routing, optimizers
    exact,      ///< an index, or whether something holds
};

/// Values in double, whatever they were computed in.
struct Result {
    Kind kind;
    std::vector<double> values;
};
using Results = std::map<std::string, Result>;

/// What decides the shapes and values of a case. They are rounded to the precision on either side, so that both compute
/// on the same numbers. With `rounding`, each number that products round is moved at random, by up to that part of it:
/// so compare.cpp finds what rounding may change.
struct Setting {
    Precision precision;
    std::uint64_t seed;
    double rounding = 0;
    std::uint64_t draw = 0;
};

struct Case {
    std::string name;
    std::uint64_t seeds;
    bool is_of_modules;
    std::function<Results(const Setting&)> run;
};

/// In the same order.
std::vector<Case> on_cpu();
std::vector<Case> on_cuda_in_double();
std::vector<Case> on_cuda_in_float();
std::vector<Case> on_cuda_in_bfloat16();
std::vector<Case> on_cuda_in_float16();

/// Whether there is a GPU.
bool has_gpu();

/// With the environment variable COLT5_SANITIZE, a tool of compute-sanitizer or `nan`: small shapes, few seeds, and an
/// allocation of its own for each tensor, filled with NaN for `nan`.
inline bool sanitized() {
    return std::getenv("COLT5_SANITIZE") != nullptr;
}
inline bool sanitized(std::string_view tool) {
    return sanitized() && std::getenv("COLT5_SANITIZE") == tool;
}

}  // namespace cases
