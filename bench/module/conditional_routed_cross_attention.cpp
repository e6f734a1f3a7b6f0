// SPDX-License-Identifier: MIT
// Queries x (b, n, 512) over the 1024 tokens routed from a long context (b, m, 512).
#include "../measure.hpp"

namespace {

constexpr colt5::CrossAttentionConfig config{
    .dim = 512, .num_tokens_q = 1024, .num_tokens_kv = 1024, .dim_head = 64, .heads = 8};

}  // namespace

int main(int argc, char** argv) {
    const bench::Inputs inputs(argc, argv);
    colt5::ConditionalRoutedCrossAttention<config, bench::Scalar, bench::Policy> module(inputs.policy);
    inputs.load(module);
    const bench::Tokens x = inputs.tokens("x"), context = inputs.tokens("context"), d_out = inputs.tokens("d_out");
    return bench::serve(inputs.policy, [&](bool backward, const bench::Keep& keep) {
        if (!backward) return keep(module(x, context));
        const auto saved = module.forward(x, context);
        auto gradients = module.make_gradients();
        keep(module.backward(saved, d_out, gradients).d_context);
    });
}
