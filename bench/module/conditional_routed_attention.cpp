// SPDX-License-Identifier: MIT
// The attention of the flagship block. Number: 0 as it is; 1 with the null tokens and the descent of version 0.11, 2
// with its rotary embeddings as well; 3 routed in blocks of 2048 tokens.
#include "../measure.hpp"

namespace {

constexpr colt5::AttentionConfig plain{.dim = 512, .num_heavy_tokens_q = 1024, .num_heavy_tokens_kv = 1024};
constexpr colt5::AttentionConfig with_null_tokens = [] {
    auto config = plain;
    config.router_kwargs.coor_descent = colt5::CoordinateDescentKwargs::version_0_11();
    config.use_null_kv = config.use_null_q_tokens = true;
    return config;
}();
constexpr colt5::AttentionConfig with_rotary = [] {
    auto config = with_null_tokens;
    config.rotary_emb = true;
    return config;
}();
constexpr colt5::AttentionConfig in_blocks = [] {
    auto config = plain;
    config.router_kwargs.route_block_size = 2048;
    return config;
}();

template <colt5::AttentionConfig config>
int serve(const bench::Inputs& inputs) {
    return serve_module(inputs, colt5::ConditionalRoutedAttention<config, bench::Scalar, bench::Policy>(inputs.policy));
}

}  // namespace

int main(int argc, char** argv) {
    const bench::Inputs inputs(argc, argv);
    switch (static_cast<int>(inputs.number(0, 0))) {
        case 0:
            return serve<plain>(inputs);
        case 1:
            return serve<with_null_tokens>(inputs);
        case 2:
            return serve<with_rotary>(inputs);
        default:
            return serve<in_blocks>(inputs);
    }
}
