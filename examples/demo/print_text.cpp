// SPDX-License-Identifier: MIT
// Prints a text as the demo reads it: that of Debian's package bible-kjv-text, unpacked, or that of the file named.
#include <cstdio>
#include <exception>

#include "text.hpp"

int main(int count, char** arguments) {
    try {
        const std::string text = demo::read_text(count > 1 ? arguments[1] : demo::bible_file);
        return std::fwrite(text.data(), 1, text.size(), stdout) == text.size() ? 0 : 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "print_text: %s\n", error.what());
        return 1;
    }
}
