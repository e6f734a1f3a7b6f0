// SPDX-License-Identifier: MIT
#include <colt5/colt5.hpp>

#include "lm.hpp"

constexpr lm::Size size{
    .block = {.dim = 128,
              .num_heavy_attn_tokens_q = 48,
              .num_heavy_attn_tokens_kv = 48,
              .num_heavy_ff_tokens = 48,
              .light_dim_head = 16,
              .light_heads = 4,
              .light_window_size = 64,
              .heavy_dim_head = 32,
              .heavy_heads = 4,
              .router_straight_through = false,
              .router_type = colt5::RouterType::causal,
              .router_kwargs = {.causal = {.rate = 1.0 / 16, .block_size = 128, .score_scale = 0.088}},
              .rotary_emb = true,
              .light_rotary_emb = true},
    .depth = 4,
    .length = 512,
    .batch = 8,
    .learning_rate = 3e-3};

int main(int count, char** arguments) {
    return lm::run<size, float>(count, arguments, colt5::Cpu());
}
