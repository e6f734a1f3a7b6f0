// SPDX-License-Identifier: MIT
// cases: 5
// first: colt5:
// expect 1: these gradients are of another module than the one named
// expect 2: these gradients are of another module than the one named
// expect 3: these gradients are of another module than the one named
// expect 4: `gradients` must be those that make_gradients() of this module returns
// expect 5: `gradients` must be those that make_gradients() of the optimizer's module returns
#include "wrong.hpp"

using colt5::Cpu;

#ifdef COLT5_COMPILE_FAIL_CONTROL
#define COLT5_CASE -1
#endif

constexpr colt5::FeedForwardConfig config{.dim = 8, .num_heavy_tokens = 2};
constexpr colt5::AttentionConfig attention_config{.dim = 8, .num_heavy_tokens_q = 2, .num_heavy_tokens_kv = 2};
using FeedForward = colt5::ConditionalRoutedFeedForward<config, float, Cpu>;
using Attention = colt5::ConditionalRoutedAttention<attention_config, float, Cpu>;

template <int number>
using Gradients = std::conditional_t<COLT5_CASE == number, Attention, FeedForward>::Gradients;

void use(const Cpu& policy, FeedForward& module, const colt5::TokensTensor<float, Cpu>& tokens) {
    Gradients<1> of_zero;
    colt5::zero_gradients<FeedForward>(policy, of_zero);
    Gradients<2> of_clip;
    colt5::clip_gradient_norm<FeedForward>(policy, of_clip, 1);
    colt5::gradient_norm<FeedForward>(policy, Gradients<3>());
    Gradients<4> of_backward;
    module.backward(module.forward(tokens), tokens, of_backward);
    colt5::AdamW(policy, module).step(module, Gradients<5>());
}
