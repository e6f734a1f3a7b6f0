// SPDX-License-Identifier: MIT
#pragma once

#include <string>

#include "models.hpp"
#include "text.hpp"

namespace demo {

struct Options {
    Settings settings;
    std::string text_file = bible_file;
    std::string page_file;
    bool help = false;
};

extern const char* const usage;

/// Throws UserError for what it does not understand.
Options parse_options(int count, char** arguments);

}  // namespace demo
