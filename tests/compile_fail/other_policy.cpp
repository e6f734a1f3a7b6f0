// SPDX-License-Identifier: MIT
// cases: 9
// expect: colt5: this tensor is in the memory of another policy than the module's; see `transfer`
#include "wrong.hpp"

/// A policy whose memory a module on the CPU cannot read.
struct Elsewhere {
    using Workspace = colt5::Cpu::Workspace;
    const std::shared_ptr<Workspace>& workspace() const { return workspace_; }
    colt5::MemoryPlan memory_plan() const { return {.tokens_at_a_time = 1, .recompute = false}; }
    std::shared_ptr<Workspace> workspace_ = std::make_shared<Workspace>();
};
void upload(const Elsewhere&, void*, const void*, std::size_t);
void download(const Elsewhere&, void*, const void*, std::size_t);

#ifdef COLT5_COMPILE_FAIL_CONTROL
#define COLT5_CASE -1
#endif

template <int number>
using PolicyOf = std::conditional_t<COLT5_CASE == number, Elsewhere, colt5::Cpu>;
template <int number>
using Tokens = colt5::TokensTensor<float, PolicyOf<number>>;
template <int number>
using Mask = colt5::MatrixTensor<bool, PolicyOf<number>>;

constexpr colt5::TransformerBlockConfig config{
    .dim = 8, .num_heavy_attn_tokens_q = 2, .num_heavy_attn_tokens_kv = 2, .num_heavy_ff_tokens = 2};
using Block = colt5::ConditionalRoutedTransformerBlock<config, float, colt5::Cpu>;
constexpr colt5::CrossAttentionConfig cross_config{.dim = 8, .num_tokens_q = 2, .num_tokens_kv = 2};
using Cross = colt5::ConditionalRoutedCrossAttention<cross_config, float, colt5::Cpu>;

void modules(const Block& block, const Cross& cross, Block::Gradients& gradients) {
    const Tokens<0> x;
    block(Tokens<1>());
    block(x, Mask<2>());
    const Tokens<3> kept;
    block.forward(kept);
    const Mask<4> kept_mask;
    block.forward(x, kept_mask);
    block.backward(block.forward(x), Tokens<5>(), gradients);
    cross(x, Tokens<6>());
    cross(x, x, {}, Mask<7>());
    block.conditional_ff(Tokens<8>());
    block.conditional_attn(x, Mask<9>());
}
