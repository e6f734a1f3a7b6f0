// SPDX-License-Identifier: MIT
#include "routers.hpp"
#include "training.hpp"

demo::Result demo::train_light_only(std::size_t number, const Task& task, const Settings& settings,
                                    Progress& progress) {
    return train<NoRouter>("light only", number, task, settings, progress);
}
