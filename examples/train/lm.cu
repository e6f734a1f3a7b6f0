// SPDX-License-Identifier: MIT
#include <colt5/cuda.cuh>

#include "lm.hpp"

constexpr lm::Size size{.block = {.dim = 512,
                                  .num_heavy_attn_tokens_q = 5120,
                                  .num_heavy_attn_tokens_kv = 5120,
                                  .num_heavy_ff_tokens = 5120,
                                  .light_window_size = 256,
                                  .router_straight_through = false,
                                  .router_type = colt5::RouterType::causal,
                                  .router_kwargs = {.causal = {.rate = 1.0 / 16, .score_scale = 0.044}},
                                  .rotary_emb = true,
                                  .light_rotary_emb = true},
                        .depth = 8,
                        .length = 65536,
                        .batch = 1,
                        .learning_rate = 6e-4};

int main(int count, char** arguments) {
    return lm::run<size, colt5::bfloat16>(count, arguments, colt5::Cuda());
}
