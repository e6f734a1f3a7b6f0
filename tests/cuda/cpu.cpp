// SPDX-License-Identifier: MIT
#include <colt5/colt5.hpp>

#include "all_cases.hpp"

std::vector<cases::Case> cases::on_cpu() {
    return all_cases<double>([](const Setting&) { return colt5::Cpu(1); });
}
