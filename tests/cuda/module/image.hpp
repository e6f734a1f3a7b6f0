// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/module/conditional_routed_image_attention.hpp>
#include <colt5/op/windows.hpp>

#include "../draw.hpp"
#include "record.hpp"

/// Cases of op/windows.hpp and of the modules of images.
namespace cases {

/// A mask of sequences (b, height · width) as one of maps (b, height, width); absent views stay absent.
template <typename P>
Tensor<bool, P, dynamic, dynamic, dynamic> map_mask(const P& policy, const Tensor<bool, P, dynamic, dynamic>& flat,
                                                    Index height) {
    if (!flat) return {};
    const Index width = flat.extent(1) / height;
    Tensor<bool, P, dynamic, dynamic, dynamic> mask(policy, {flat.extent(0), height, width});
    assign(policy, mask.view().rows(), flat.const_view().reshape(std::array{flat.extent(0) * height, width}));
    return mask;
}

template <typename T, typename P>
Results windows_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const bool channel_first = setting.seed % 2 == 0;
    const Index batch = draw.size(1, 5), dim = draw.chance(0.5) ? 8 * draw.size(1, 20) : draw.size(1, 150);
    const Index height = draw.length(200, batch * dim), width = draw.length(200, batch * dim * height);
    const auto maps =
        draw.values(channel_first ? std::array{batch, dim, height, width} : std::array{batch, height, width, dim});
    const WindowGrid grid = window_grid("maps", maps, draw.size(1, 17), channel_first);
    const auto tokens = to_windows(policy, maps, grid, channel_first);
    record("tokens", tokens, Kind::exact);
    record("maps", from_windows(policy, draw.values(tokens.shape()), grid, channel_first), Kind::exact);
    const auto mask = map_mask(policy, draw.optional_mask(batch, height * width), height);
    const auto of_tokens = window_mask(policy, mask.const_view(), batch, grid);
    auto mask_as_numbers = draw.sums(of_tokens.shape());
    if (of_tokens) assign(policy, mask_as_numbers, cast<accumulate_t<T>>(of_tokens));
    record("mask", mask_as_numbers, Kind::exact);
    return record.results;
}

constexpr ImageAttentionConfig image_config(RoutingScope scope, bool channel_first, Index routes) {
    return {.dim = 48,
            .num_heavy_tokens_q = 12,
            .num_heavy_tokens_kv = 20,
            .num_routed_kv = routes,
            .light_dim_head = 16,
            .light_heads = 3,
            .light_window_size = 7,
            .heavy_dim_head = 32,
            .heavy_heads = 4,
            .router_straight_through = false,
            .router_kwargs = {.coor_descent = {.score_scale = 0.2}},
            .channel_first = channel_first,
            .routing_scope = scope,
            .use_null_kv = true,
            .use_null_q_tokens = true};
}
inline constexpr ImageAttentionConfig over_map = image_config(RoutingScope::map, false, 1),
                                      over_map_of_channels = image_config(RoutingScope::map, true, 2),
                                      per_window = image_config(RoutingScope::window, true, 1);

template <ImageAttentionConfig config, typename T, typename P>
Results image_attention_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 5), height = draw.length(40), width = draw.length(40);
    const auto maps = draw.values(config.channel_first ? std::array{batch, Index{48}, height, width}
                                                       : std::array{batch, height, width, Index{48}});
    const auto mask = map_mask(policy, draw.optional_mask(batch, height * width), height);
    const Residual residual = draw.chance(0.5) ? Residual::tokens : Residual::none;
    record_module(record, draw, draw.template made<ConditionalRoutedImageAttention<config, T, P>>(), maps,
                  mask.const_view(), AttentionTokens{}, residual);
    return record.results;
}

}  // namespace cases
