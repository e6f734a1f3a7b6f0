// SPDX-License-Identifier: MIT
// expect: colt5: ViTConfig.patch_size must be at least 1
// expect: colt5: ViTConfig.num_classes must be at least 1
// expect: colt5: ViTConfig.depth must be at least 1
// expect: colt5: ViTConfig.dim must be a multiple of 4, at least 8
// expect: colt5: ViTConfig.channels must be at least 1
#include "wrong.hpp"

template <colt5::ViTConfig config>
using Module = colt5::ConditionalRoutedViT<config, float, colt5::Cpu>;
using Config = colt5::ViTConfig;

constexpr Config valid{.patch_size = 4,
                       .num_classes = 2,
                       .dim = 8,
                       .depth = 1,
                       .attn_num_heavy_tokens_q = 2,
                       .attn_num_heavy_tokens_kv = 2,
                       .attn_light_window_size = 4,
                       .ff_num_heavy_tokens = 2};
template <typename Change>
constexpr Config with(Change change) {
    Config config = valid;
    change(config);
    return config;
}
constexpr Config patch_size = with([](Config& config) { config.patch_size = wrong(0, 4); });
constexpr Config num_classes = with([](Config& config) { config.num_classes = wrong(0, 2); });
constexpr Config depth = with([](Config& config) { config.depth = wrong(0, 1); });
constexpr Config dim = with([](Config& config) { config.dim = wrong(10, 12); });
constexpr Config channels = with([](Config& config) { config.channels = wrong(0, 1); });

static_assert(complete<Module<patch_size>> && complete<Module<num_classes>> && complete<Module<depth>>);
static_assert(complete<Module<dim>> && complete<Module<channels>>);
