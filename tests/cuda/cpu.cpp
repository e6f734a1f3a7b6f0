// SPDX-License-Identifier: MIT
#include <colt5/colt5.hpp>

#include "bodies.hpp"

std::vector<cases::Case> cases::on_cpu() {
    return all_cases([](Precision) { return colt5::Cpu(2); });
}
