// SPDX-License-Identifier: MIT
#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "result.hpp"

namespace demo {

/// The comparison, for the terminal.
void print_table(std::ostream& out, const std::vector<Result>& results);

/// The comparison, the loss curves, and a document with its routed bytes shaded, layer by layer: one HTML file that
/// needs no other. The first result is that of the learned router, the second that of the random one.
void write_page(std::ostream& out, const std::vector<Result>& results, const std::string& text_name);

}  // namespace demo
