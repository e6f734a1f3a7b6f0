// SPDX-License-Identifier: MIT
#include "training.hpp"

demo::Result demo::train_learned(std::size_t number, const Task& task, const Settings& settings, Progress& progress) {
    return train<colt5::CoordinateDescentRouter>("learned routing", number, task, settings, progress);
}
