// SPDX-License-Identifier: MIT
// Configurations are compile-time values: a program that chooses one at run time has the code of all of them.
// Usage: 15_many_configurations [small|medium|large]
#include <colt5/colt5.hpp>

#include <cstdio>
#include <functional>
#include <map>
#include <string>

using namespace colt5;

// [configurations]
template <FeedForwardConfig config>
TokensTensor<float, Cpu> run(const Cpu& policy, const TokensTensor<float, Cpu>& tokens) {
    const ConditionalRoutedFeedForward<config, float, Cpu> feedforward{policy, Seed{0}};
    return feedforward(tokens);
}

const std::map<std::string, std::function<TokensTensor<float, Cpu>(const Cpu&, const TokensTensor<float, Cpu>&)>> runs{
    {"small", run<FeedForwardConfig{.dim = 64, .num_heavy_tokens = 8}>},
    {"medium", run<FeedForwardConfig{.dim = 64, .num_heavy_tokens = 32}>},
    {"large", run<FeedForwardConfig{.dim = 64, .num_heavy_tokens = 32, .heavy_ff_mult = 8}>}};
// [configurations]

int main(int count, char** arguments) {
    const auto chosen = runs.find(count > 1 ? arguments[1] : "medium");
    if (chosen == runs.end()) {
        std::fprintf(stderr, "usage: %s [small|medium|large]\n", arguments[0]);
        return 2;
    }
    const Cpu policy;
    TokensTensor<float, Cpu> tokens(policy, {2, 256, 64});
    fill_normal(policy, tokens, Random(Seed{1}));
    std::printf("%s: norm of the output %g\n", chosen->first.c_str(), chosen->second(policy, tokens).vector().norm());
}
