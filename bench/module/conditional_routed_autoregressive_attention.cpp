// SPDX-License-Identifier: MIT
// The reference's autoregressive attention: 32 queries of each window of 128 tokens, 1024 keys of all tokens before it.
// One route of keys: with more, the package gathers them from the wrong windows (docs/differences.md).
#include "../measure.hpp"

namespace {

constexpr colt5::AutoregressiveAttentionConfig config = [] {
    colt5::AutoregressiveAttentionConfig numbers{.dim = 512, .num_heavy_tokens_q = 32, .num_heavy_tokens_kv = 1024};
    numbers.router_kwargs.coor_descent = colt5::CoordinateDescentKwargs::version_0_11();
    numbers.use_null_q_tokens = true;
    return numbers;
}();

}  // namespace

int main(int argc, char** argv) {
    const bench::Inputs inputs(argc, argv);
    colt5::ConditionalRoutedAutoregressiveAttention<config, bench::Scalar, bench::Policy> module(inputs.policy);
    inputs.load(module);
    const bench::Tokens x = inputs.tokens("x"), d_out = inputs.tokens("d_out");
    return bench::serve(inputs.policy, [&](bool backward, const auto& keep) {
        if (!backward) return keep(module(x));
        auto saved = module.forward(x);
        auto gradients = module.make_gradients();
        keep(module.backward(std::move(saved), d_out ? d_out : x, gradients));
    });
}
