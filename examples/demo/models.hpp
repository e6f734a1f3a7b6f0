// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "progress.hpp"
#include "result.hpp"
#include "task.hpp"

/// The three models. They differ in the router alone: same first weights, same documents, same number of steps.
namespace demo {

struct Settings {
    Index steps = 700;
    Index tokens = 4 * full_length;  // in a step
    Index held_out_batches = 16;     // of 8 documents
    std::uint64_t seed = 0;
};

/// Trains and evaluates, on one thread. `number` is the model's line in the progress display.
Result train_learned(std::size_t number, const Task& task, const Settings& settings, Progress& progress);
Result train_random(std::size_t number, const Task& task, const Settings& settings, Progress& progress);
Result train_light_only(std::size_t number, const Task& task, const Settings& settings, Progress& progress);

}  // namespace demo
