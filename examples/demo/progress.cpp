// SPDX-License-Identifier: MIT
#include "progress.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string_view>
#include <utility>

namespace demo {
namespace {

bool can_redraw() {
    const char* terminal = std::getenv("TERM");
    return isatty(STDOUT_FILENO) == 1 && terminal != nullptr && std::string_view(terminal) != "dumb";
}

std::string bar(double done) {
    constexpr int width = 24;
    const int eighths = static_cast<int>(done * width * 8);
    std::string text;
    for (int i = 0; i < width; ++i) {
        constexpr std::array<const char*, 9> blocks{"░", "▏", "▎", "▍", "▌", "▋", "▊", "▉", "█"};
        text += blocks[static_cast<std::size_t>(std::clamp(eighths - 8 * i, 0, 8))];
    }
    return text;
}

}  // namespace

Progress::Progress(std::vector<std::string> names) : terminal_(can_redraw()) {
    for (auto& name : names) rows_.push_back({.name = std::move(name)});
}

void Progress::update(std::size_t model, double done, const Point& now, double tokens_per_second) {
    const std::lock_guard lock(mutex_);
    Row& row = rows_[model];
    row.done = done;
    row.now = now;
    row.tokens_per_second = tokens_per_second;
    if (terminal_) {
        const auto time = std::chrono::steady_clock::now();
        if (drawn_ && done < 1 && time - last_ < std::chrono::milliseconds(100)) return;
        last_ = time;
        draw();
    } else if (const int tenths = static_cast<int>(10 * done + 1e-9); tenths > row.printed_tenths) {
        row.printed_tenths = tenths;
        std::printf("%-16s %3d %%   loss %.3f   accuracy %5.1f %%   %.0f tokens/s\n", row.name.c_str(), 10 * tenths,
                    now.loss, 100 * now.accuracy, tokens_per_second);
        std::fflush(stdout);
    }
}

void Progress::draw() {
    if (drawn_) std::printf("\x1b[%zuA", rows_.size());
    for (const Row& row : rows_)
        std::printf("\r%-16s %s %3.0f %%  loss %.3f  accuracy %5.1f %%  %4.0fk tokens/s\x1b[K\n", row.name.c_str(),
                    bar(row.done).c_str(), 100 * row.done, row.now.loss, 100 * row.now.accuracy,
                    row.tokens_per_second / 1000);
    std::fflush(stdout);
    drawn_ = true;
}

}  // namespace demo
