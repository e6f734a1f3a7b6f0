// SPDX-License-Identifier: MIT
// Compiled with COLT5_CHECK_TOKENS, which must be the same in all of a program.
#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr TransformerBlockConfig block_config{.dim = 8,
                                              .num_heavy_attn_tokens_q = 3,
                                              .num_heavy_attn_tokens_kv = 4,
                                              .num_heavy_ff_tokens = 3,
                                              .light_dim_head = 4,
                                              .light_heads = 2,
                                              .light_window_size = 4,
                                              .heavy_dim_head = 4,
                                              .heavy_heads = 2};
using Block = ConditionalRoutedTransformerBlock<block_config, float, Cpu>;
constexpr CrossAttentionConfig cross_config{.dim = 8, .num_tokens_q = 3, .num_tokens_kv = 4, .dim_head = 4, .heads = 2};
using Cross = ConditionalRoutedCrossAttention<cross_config, float, Cpu>;

constexpr const char* changed = "colt5: `tokens` must be what forward was given, but is changed since";

}  // namespace

TEST_CASE("debug: tokens that change between forward and backward are found") {
    const Cpu policy(1);
    const Block block(policy, Seed{1});
    auto x = normal<float>(policy, std::array<Index, 3>{2, 12, 8}, 0);
    const auto d_out = normal<float>(policy, x.shape(), 1);
    auto gradients = block.make_gradients();
    const auto saved = block.forward(x);
    std::swap(x.view()(0, 1, 0), x.view()(1, 11, 7));  // the same numbers in other places
    CHECK_THROWS_WITH_AS(block.backward(saved, d_out, gradients), changed, ValueError);
    std::swap(x.view()(0, 1, 0), x.view()(1, 11, 7));
    block.backward(saved, d_out, gradients);
}

TEST_CASE("debug: so is a context that changes") {
    const Cpu policy(1);
    const Cross cross(policy, Seed{1});
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 12, 8}, 0),
               d_out = normal<float>(policy, x.shape(), 1);
    auto context = normal<float>(policy, std::array<Index, 3>{2, 5, 8}, 2);
    auto gradients = cross.make_gradients();
    const auto saved = cross.forward(x, context);
    context.view()(1, 4, 7) += 1;
    CHECK_THROWS_WITH_AS(cross.backward(saved, d_out, gradients), changed, ValueError);
    context.view()(1, 4, 7) -= 1;
}
