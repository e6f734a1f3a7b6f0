// SPDX-License-Identifier: MIT
#include "device.hpp"

std::vector<cases::Case> cases::on_cuda_in_float16() {
    return all_cases_on_cuda<float16>();
}
