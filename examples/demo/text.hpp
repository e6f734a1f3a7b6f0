// SPDX-License-Identifier: MIT
#pragma once

#include <stdexcept>
#include <string>

namespace demo {

/// What the user can put right; printed as one line.
struct UserError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// Where Debian's and Ubuntu's package bible-kjv-text puts its text.
inline constexpr const char* bible_file = "/usr/lib/bible.data";

/// The bytes of a file; the packed text of bible-kjv-text is unpacked. Throws UserError.
std::string read_text(const std::string& path);

}  // namespace demo
