// SPDX-License-Identifier: MIT
#include "device.hpp"

bool cases::has_gpu() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

std::vector<cases::Case> cases::on_cuda_in_double() {
    return all_cases_on_cuda<double>();
}
std::vector<cases::Golden> cases::goldens_in_double() {
    return all_goldens_on_cuda<double>();
}
