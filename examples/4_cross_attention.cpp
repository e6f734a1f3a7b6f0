// SPDX-License-Identifier: MIT
// Conditional cross attention: a short sequence reads from a long memory, of which 64 tokens are routed.
#include <colt5/colt5.hpp>

#include <cstdio>

int main() {
    using namespace colt5;
    constexpr CrossAttentionConfig config{
        .dim = 64, .num_tokens_q = 64, .num_tokens_kv = 64, .dim_head = 16, .heads = 4, .kv_routing_tokens = 2};
    Cpu policy;
    ConditionalRoutedCrossAttention<config, float, Cpu> cross{policy, Seed{0}};

    TokensTensor<float, Cpu> queries(policy, {1, 100, config.dim}), memory(policy, {1, 20000, config.dim});
    fill_normal(policy, queries, Random(Seed{1}));
    fill_normal(policy, memory, Random(Seed{2}));

    auto saved = cross.forward(queries, memory);  // routes 64 of the 100 queries, and twice 64 of the 20000 memories
    auto gradients = cross.make_gradients();
    const auto d = cross.backward(saved, saved.out, gradients);  // of the loss ‖out‖² / 2

    Index read = 0;
    for (Index i = 0; i < memory.extent(1); ++i) read += d.d_context.matrix().row(i).norm() > 0 ? 1 : 0;
    std::printf("%td of %td memories get a gradient\n", read, memory.extent(1));
    return read > 0 ? 0 : 1;
}
