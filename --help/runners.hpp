// SPDX-License-Identifier: MIT
// Written by tests/golden/configure.py.
#pragma once

#include "run.hpp"

namespace golden {

template <typename Scalar, Policy P>
std::vector<Runner<P>> runners() {
    return {
    };
}

}  // namespace golden
