// SPDX-License-Identifier: MIT
#pragma once

#include <chrono>
#include <mutex>
#include <string>
#include <vector>

#include "result.hpp"

namespace demo {

/// One line for each model, all redrawn in place on a terminal; elsewhere a plain line for every tenth of a training.
class Progress {
public:
    explicit Progress(std::vector<std::string> names);
    /// Safe to call from several threads. `done` is the part of the training that is behind us.
    void update(std::size_t model, double done, const Point& now, double tokens_per_second);

private:
    struct Row {
        std::string name;
        double done = 0, tokens_per_second = 0;
        Point now{};
        int printed_tenths = 0;
    };
    void draw();

    std::mutex mutex_;
    std::vector<Row> rows_;
    bool terminal_;
    bool drawn_ = false;
    std::chrono::steady_clock::time_point last_{};
};

}  // namespace demo
