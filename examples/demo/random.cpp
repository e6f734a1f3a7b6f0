// SPDX-License-Identifier: MIT
#include "routers.hpp"
#include "training.hpp"

demo::Result demo::train_random(std::size_t number, const Task& task, const Settings& settings, Progress& progress) {
    return train<RandomRouter>("random routing", number, task, settings, progress);
}
