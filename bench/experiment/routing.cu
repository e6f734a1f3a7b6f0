// SPDX-License-Identifier: MIT
// The long form of the experiment: larger models and longer sequences on a GPU, in bfloat16, one training at a time.
#include "program.hpp"

namespace {
using namespace experiment;

constexpr Size large{.dim = 256,
                     .light_heads = 4,
                     .light_dim_head = 64,
                     .light_window = 128,
                     .heavy_heads = 4,
                     .heavy_dim_head = 64,
                     .depth = 4,
                     .length = 16384,
                     .tokens = 16384,
                     .learning_rate = 1e-3};
}  // namespace

int main(int count, char** arguments) {
    return run_program(count, arguments, [](const Options& options) {
        const std::string text = demo::read_text(options.text);
        const colt5::Cuda policy;
        run_all(options, text, large, 1500, 4, 1, [&](const Size& size, const Run& run) {
            if (run.task == Task::language) return train<large, true, colt5::bfloat16>(policy, text, size, run);
            return train<large, false, colt5::bfloat16>(policy, text, size, run);
        });
    });
}
