// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/module/conditional_routed_image_attention.hpp>
#include <colt5/module/conditional_routed_vit.hpp>
#include <colt5/op/map_tokens.hpp>
#include <colt5/op/windows.hpp>

#include "../draw.hpp"
#include "record.hpp"

/// Cases of op/windows.hpp, of op/map_tokens.hpp and of the modules of images.
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

template <typename T, typename P>
Results map_tokens_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 5), dim = 4 * draw.size(2, 40);
    const Index height = draw.length(200, batch * dim), width = draw.length(200, batch * dim * height);
    const WindowGrid grid{height, width, draw.size(1, 9)};
    auto tokens = draw.values(std::array{batch, grid.tokens(), dim});
    record("mean", map_mean(policy, tokens, grid));
    record("d_tokens", map_mean_vjp(policy, draw.values(std::array{batch, Index{1}, dim}), grid));
    add_sincos_positions(policy, tokens.view(), grid);
    record("tokens with positions", tokens);
    return record.results;
}

constexpr ImageAttentionConfig image_config(RoutingScope scope, bool channel_first, Index routes,
                                            RouterType router = RouterType::coor_descent) {
    return {.dim = 48,
            .num_heavy_tokens_q =
                scope == RoutingScope::map ? 12 : 4,  // a router that takes a whole window has no gradient
            .num_heavy_tokens_kv = scope == RoutingScope::map ? 20 : 5,
            .num_routed_kv = routes,
            .light_dim_head = 16,
            .light_heads = 3,
            .light_window_size = 7,
            .heavy_dim_head = 32,
            .heavy_heads = 4,
            .router_straight_through = false,
            .router_type = router,
            .router_kwargs = {.coor_descent = {.score_scale = 0.2}},
            .channel_first = channel_first,
            .routing_scope = scope,
            .use_null_kv = true,
            .use_null_q_tokens = true};
}
inline constexpr ImageAttentionConfig over_map = image_config(RoutingScope::map, false, 1),
                                      over_map_of_channels = image_config(RoutingScope::map, true, 2),
                                      per_window = image_config(RoutingScope::window, true, 1),
                                      over_map_by_softmax =
                                          image_config(RoutingScope::map, false, 1, RouterType::cum_softmax),
                                      per_window_by_sinkhorn =
                                          image_config(RoutingScope::window, true, 1, RouterType::sinkhorn);

template <ImageAttentionConfig config, typename T, typename P>
Results image_attention_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 5), height = draw.length(40), width = draw.length(40);
    const auto maps = draw.tokens(config.channel_first ? std::array{batch, Index{48}, height, width}
                                                       : std::array{batch, height, width, Index{48}});
    const auto mask = map_mask(policy, draw.optional_mask(batch, height * width), height);
    const Residual residual = draw.chance(0.5) ? Residual::tokens : Residual::none;
    record_module(record, draw, draw.template made<ConditionalRoutedImageAttention<config, T, P>>(), maps,
                  mask.const_view(), AttentionCounts{}, residual);
    return record.results;
}

/// A step of it: embedding, attention, feedforward and classifier, each of numbers that are the same on either side.
/// The whole routes by what its layers computed: in double and float.
inline constexpr ViTConfig vit_config{.patch_size = 4,
                                      .num_classes = 10,
                                      .dim = 48,
                                      .depth = 2,
                                      .attn_num_heavy_tokens_q = 12,
                                      .attn_num_heavy_tokens_kv = 20,
                                      .attn_heavy_dim_head = 32,
                                      .attn_heavy_heads = 4,
                                      .attn_light_dim_head = 16,
                                      .attn_light_heads = 3,
                                      .attn_light_window_size = 5,
                                      .ff_num_heavy_tokens = 17,
                                      .router_straight_through = false,
                                      .router_kwargs = {.coor_descent = {.score_scale = 0.2}}};

template <typename T, typename P>
Results vit_case(const P& policy, const Setting& setting) {
    using ViT = ConditionalRoutedViT<vit_config, T, P>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const ViT vit = draw.template made<ViT>();
    const Index batch = draw.size(1, 5);
    const auto images = draw.tokens(std::array{batch, Index{3}, 4 * draw.length(15), 4 * draw.length(15)});
    auto gradients = vit.make_gradients();
    const auto embedded = vit.embed(images);
    record("tokens", embedded.tokens);
    const auto d_tokens = draw.values(embedded.tokens.shape());
    record("d_images", vit.embed_gradients(embedded, d_tokens, gradients));
    const auto tokens = draw.values(embedded.tokens.shape());
    const auto head = vit.linear_head.forward(policy, tokens, embedded.grid);
    record("classes", head.out);
    const auto d_out = draw.values(head.out.shape());
    record("d_tokens of the classifier",
           vit.linear_head.backward(policy, head, d_out, embedded.grid, gradients.linear_head));
    ViT::each_parameter(
        [&](const std::string& name, auto& gradient) {
            if (!name.starts_with("transformer")) record("gradient of " + name + " alone", gradient);
        },
        "", gradients);
    if (setting.precision == Precision::fp64 || setting.precision == Precision::fp32)
        record_module(record, draw, vit, images);
    return record.results;
}

}  // namespace cases
