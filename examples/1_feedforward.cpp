// SPDX-License-Identifier: MIT
// A conditional feedforward: a light branch for every token, a heavy one for the 32 tokens that the router chooses.

// [feedforward]
#include <colt5/colt5.hpp>

#include <cstdio>

int main() {
    using namespace colt5;
    constexpr FeedForwardConfig config{.dim = 64, .num_heavy_tokens = 32};

    Cpu policy;  // where tensors live and what computes: the CPU, all its processors; Cpu policy{2}: two threads
    ConditionalRoutedFeedForward<config, float, Cpu> feedforward{policy, Seed{0}};

    TokensTensor<float, Cpu> tokens(policy, {2, 512, 64});  // (b, n, d)
    fill_normal(policy, tokens, Random(Seed{1}));

    const auto out = feedforward(tokens);                               // (b, n, d)
    const auto few = feedforward(tokens, {}, {.num_heavy_tokens = 4});  // another number of heavy tokens, for one call

    std::printf("%td sequences of %td tokens of dimension %td\n", out.extent(0), out.extent(1), out.extent(2));
    std::printf("with 32 and with 4 heavy tokens the outputs differ by %g\n", (out.matrix() - few.matrix()).norm());
}
// [feedforward]
