// SPDX-License-Identifier: MIT
#include "options.hpp"

#include <charconv>
#include <filesystem>
#include <string_view>

namespace demo {

const char* const usage =
    R"(usage: demo [OPTION...] [TEXT]

Hides notes in documents from TEXT, a file of any kind (by default the one of Debian's package bible-kjv-text), asks
for them at the end, and trains three small byte-level encoders to answer: with learned routing, with random routing,
and without the heavy branch. Then writes a page that shows which bytes are routed.

  --quick        a few steps, too few to learn anything: to see that everything runs
  --steps N      of training (700), the same for each encoder
  --seed N       of models and documents (0); on one machine the same seed and steps give the same answers and routes
  --out FILE     where the page goes (build/demo.html)
  --help         this text
)";

namespace {

template <typename Number>
Number parse_number(std::string_view option, std::string_view text, Number least) {
    Number value{};
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < least)
        throw UserError(std::string(option) + " takes a number of at least " + std::to_string(least) + ", not '" +
                        std::string(text) + "'");
    return value;
}

}  // namespace

Options parse_options(int count, char** arguments) {
    Options options;
    options.page_file = std::filesystem::is_directory("build") ? "build/demo.html" : "demo.html";
    bool has_text = false;
    for (int i = 1; i < count; ++i) {
        std::string_view option = arguments[i];
        if (!option.starts_with('-')) {
            if (has_text) throw UserError("two texts: '" + options.text_file + "' and '" + std::string(option) + "'");
            options.text_file = option;
            has_text = true;
            continue;
        }
        const auto value = [&] {
            if (i + 1 == count) throw UserError(std::string(option) + " needs a value; see --help");
            return std::string_view(arguments[++i]);
        };
        if (option == "--help" || option == "-h") {
            options.help = true;
        } else if (option == "--quick") {
            options.settings.steps = 70;
            options.settings.held_out_batches = 2;
        } else if (option == "--steps") {
            options.settings.steps = parse_number<long>(option, value(), 20);
        } else if (option == "--seed") {
            options.settings.seed = parse_number<std::uint64_t>(option, value(), 0);
        } else if (option == "--out") {
            options.page_file = value();
        } else {
            throw UserError("unknown option '" + std::string(option) + "'; see --help");
        }
    }
    return options;
}

}  // namespace demo
