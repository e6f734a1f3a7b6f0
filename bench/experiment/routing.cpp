// SPDX-License-Identifier: MIT
// The short form of the experiment: small models on the CPU, several trainings side by side, each on one processor.
#include "program.hpp"

namespace {
using namespace experiment;

constexpr Size small{.dim = 64,
                     .light_heads = 2,
                     .light_dim_head = 8,
                     .light_window = 16,
                     .heavy_heads = 4,
                     .heavy_dim_head = 16,
                     .depth = 2,
                     .length = 1024,
                     .tokens = 4096,
                     .learning_rate = 3e-3};
}  // namespace

int main(int count, char** arguments) {
    return run_program(count, arguments, [](const Options& options) {
        const std::string text = demo::read_text(options.text);
        const unsigned workers = options.threads > 0 ? options.threads : std::thread::hardware_concurrency();
        run_all(options, text, small, 1200, 4, workers, [&](const Size& size, const Run& run) {
            const colt5::Cpu policy(1);
            if (run.task == Task::language) return train<small, true, float>(policy, text, size, run);
            return train<small, false, float>(policy, text, size, run);
        });
    });
}
