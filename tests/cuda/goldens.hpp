// SPDX-License-Identifier: MIT
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "cases.hpp"
#include "file.hpp"

namespace cases {

/// A golden file as a computation on the GPU, in a precision.
struct Golden {
    std::string name, path;
    bool by_cosine;  // its routers normalize tokens and routing tokens
    std::function<golden::Arrays(Precision precision, golden::File& file, const golden::Variation& variation)> run;
};

/// In the same order.
std::vector<Golden> goldens_in_double();
std::vector<Golden> goldens_in_float();
std::vector<Golden> goldens_in_bfloat16();

}  // namespace cases
