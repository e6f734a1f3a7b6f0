// SPDX-License-Identifier: MIT
#include <array>
#include <set>
#include <string>
#include <utility>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr ViTConfig with(RoutingScope scope, Index depth) {
    return {.patch_size = 2,
            .num_classes = 3,
            .dim = 8,
            .depth = depth,
            .attn_num_heavy_tokens_q = 3,
            .attn_num_heavy_tokens_kv = 4,
            .attn_heavy_dim_head = 3,
            .attn_heavy_heads = 2,
            .attn_light_dim_head = 2,
            .attn_light_heads = 2,
            .attn_light_window_size = 2,
            .ff_num_heavy_tokens = 4,
            .ff_heavy_mult = 2,
            .ff_light_mult = 0.5,
            .channels = 2,
            .router_straight_through = false,
            .routing_scope = scope,
            .use_null_kv = true,
            .use_null_q_tokens = true};
}
constexpr ViTConfig over_map = with(RoutingScope::map, 2), per_window = with(RoutingScope::window, 1);
template <ViTConfig config, typename Scalar = double>
using ViT = ConditionalRoutedViT<config, Scalar, Cpu>;
using InFloat = ViT<over_map, float>;

}  // namespace

TEST_CASE_TEMPLATE("ConditionalRoutedViT: gradients by finite differences" * not_sanitized, Module, ViT<over_map>,
                   ViT<per_window>) {
    const Cpu policy(1);
    Module module(policy, Seed{1});
    auto images = normal<double>(policy, std::array<Index, 4>{2, 2, 6, 10}, 0);  // 3 x 5 patches: padded
    const auto d_out = normal<double>(policy, std::array<Index, 2>{2, 3}, 1);
    const auto saved = module.forward(images);
    CHECK(same_bits(saved.out, module(images)));
    auto gradients = module.make_gradients();
    const auto d_images = module.backward(saved, d_out, gradients);
    const auto loss = [&] { return inner(d_out, module(images)); };
    CHECK(gradient_error(d_images, finite_differences(policy, images, loss)) <= gradient_tolerance);
    check_parameter_gradients(policy, module, gradients, loss);

    auto again = module.make_gradients();
    CHECK(same_bits(module.backward(module.forward(images), d_out, again), d_images));
    Module::each_parameter([](const std::string&, const auto& a, const auto& b) { CHECK(same_bits(a, b)); }, "",
                           gradients, again);
}

TEST_CASE("ConditionalRoutedViT: its steps are those of the public modules") {
    const Cpu policy(2);
    const ViT<over_map> vit(policy, Seed{1});
    using Image = ViT<over_map>::ImageAttention;
    const auto images = normal<double>(policy, std::array<Index, 4>{2, 2, 6, 10}, 0);

    // Patches (p1 p2 c), row by row.
    auto patches = filled<double>(policy, std::array<Index, 3>{2, 15, 8}, 0);
    for (Index b = 0; b < 2; ++b)
        for (Index y = 0; y < 6; ++y)
            for (Index x = 0; x < 10; ++x)
                for (Index c = 0; c < 2; ++c)
                    patches.view()(b, y / 2 * 5 + x / 2, (y % 2 * 2 + x % 2) * 2 + c) = images.const_view()(b, c, y, x);
    const auto& embedding = vit.to_patch_embedding;
    const auto embedded = embedding.norm(policy, embedding.projection(policy, embedding.pixel_norm(policy, patches)));
    HostTensor<double, 4> x(policy, {2, 3, 5, 8});
    std::copy_n(embedded.data(), x.size(), x.data());
    for (Index b = 0; b < 2; ++b)
        for (Index row = 0; row < 3; ++row)
            for (Index column = 0; column < 5; ++column)
                for (Index c = 0; c < 2; ++c) {
                    double* const token = &x.view()(b, row, column, c);
                    const double frequency = c == 0 ? 1 : 1e-4;
                    token[0] += std::sin(double(column) * frequency);
                    token[2] += std::cos(double(column) * frequency);
                    token[4] += std::sin(double(row) * frequency);
                    token[6] += std::cos(double(row) * frequency);
                }

    Image attention(policy);
    for (const auto& layer : vit.layers) {
        copy_parameters(policy, attention.attention, layer.attention);
        const auto attended = attention(x, {}, {}, Residual::tokens);
        const auto out =
            layer.feed_forward(attended.const_view().reshape(std::array<Index, 3>{2, 15, 8}), {}, {}, Residual::tokens);
        std::copy_n(out.data(), x.size(), x.data());
    }
    const auto& head = vit.linear_head;
    auto expected = filled<double>(policy, std::array<Index, 2>{2, 3}, 0);
    for (Index b = 0; b < 2; ++b) {
        Row mean(8, 0.0);
        for (Index i = 0; i < 15; ++i)
            for (std::size_t j = 0; j < 8; ++j)
                mean[j] += x.const_view()[b].data()[static_cast<std::size_t>(i) * 8 + j] / 15;
        const Row logits = evaluate(head.projection, evaluate(head.norm, mean));
        std::copy(logits.begin(), logits.end(), expected.view()[b].data());
    }
    CHECK(relative_error(vit(images), expected) <= 1e-11);
}

TEST_CASE_TEMPLATE("ConditionalRoutedViT: a batch gives each image the bits that it gets alone", Module, ViT<over_map>,
                   ViT<per_window>, InFloat) {
    using T = typename Module::Out::value_type;
    const Cpu policy(2);
    const Module module(policy, Seed{1});
    for (const auto& [height, width] : {std::array<Index, 2>{2, 4}, std::array<Index, 2>{50, 62}}) {
        const auto images = normal<T>(policy, std::array<Index, 4>{3, 2, height, width}, 0);
        const auto d_out = normal<T>(policy, std::array<Index, 2>{3, 3}, 1);
        auto gradients = module.make_gradients();
        const auto together = module.forward(images);
        const auto d_images = module.backward(together, d_out, gradients);
        for (Index b = 0; b < 3; ++b) {
            auto alone = module.forward(sequence(images, b));
            CHECK(same_bits(alone.out, sequence(together.out, b)));
            CHECK(same_bits(module.backward(std::move(alone), sequence(d_out, b), gradients), sequence(d_images, b)));
        }
    }
}

TEST_CASE("ConditionalRoutedViT: names of the reference, what was routed, no memory for a second call") {
    const Cpu policy(2, Cpu::usual_plan, Allocations::together);
    const ViT<over_map> module(policy, Seed{1});
    std::set<std::string> names;
    ViT<over_map>::each_parameter([&](const std::string& name, const auto&) { names.insert(name); }, "", module);
    for (const char* const name :
         {"to_patch_embedding.1.weight", "to_patch_embedding.2.bias", "to_patch_embedding.3.bias",
          "transformer.layers.0.0.light_attn.norm.gamma", "transformer.layers.1.0.kv_router.routing_token",
          "transformer.layers.1.1.heavy_ff.3.weight", "linear_head.1.weight", "linear_head.2.weight"})
        CHECK(names.contains(name));
    const auto images = normal<double>(policy, std::array<Index, 4>{2, 2, 6, 10}, 0);
    names.clear();
    module.forward(images).each_routing([&](const std::string& name, const auto&) { names.insert(name); });
    CHECK(names == std::set<std::string>{"transformer.layers.0.0.q_router", "transformer.layers.0.0.kv_router",
                                         "transformer.layers.0.1.router", "transformer.layers.1.0.q_router",
                                         "transformer.layers.1.0.kv_router", "transformer.layers.1.1.router"});
    auto gradients = module.make_gradients();
    const auto d_out = normal<double>(policy, std::array<Index, 2>{2, 3}, 1);
    const auto step = [&] { module.backward(module.forward(images), d_out, gradients); };
    step();
    const auto allocations = policy.workspace()->statistics().system_allocations;
    step();
    CHECK(policy.workspace()->statistics().system_allocations == allocations);
}

TEST_CASE("ConditionalRoutedViT: a parameter of the wrong shape throws before any layer counts a call") {
    constexpr ViTConfig noisy = [] {
        ViTConfig config = over_map;
        config.router_type = RouterType::sinkhorn;
        return config;
    }();
    const Cpu policy(1);
    ViT<noisy, float> vit(policy, Seed{1});
    const ViT<noisy, float> untouched(policy, Seed{1});
    const auto images = normal<float>(policy, std::array<Index, 4>{2, 2, 6, 10}, 0);
    const auto before = noise_state(vit);
    CHECK(!before.empty());
    const auto throws_with_wrong = [&](auto& parameter) {
        auto kept = std::move(parameter);
        auto shape = kept.shape();
        ++shape[shape.size() - 1];
        parameter = filled<float>(policy, shape, 1);
        CHECK_THROWS_AS(vit.forward(images), ShapeError);
        CHECK(noise_state(vit) == before);
        parameter = std::move(kept);
    };
    throws_with_wrong(vit.layers[1].attention.heavy_attn.to_q.weight);
    throws_with_wrong(vit.layers[1].feed_forward.router.routing_token);
    throws_with_wrong(vit.linear_head.norm.bias);
    throws_with_wrong(vit.linear_head.projection.weight);
    throws_with_wrong(vit.linear_head.projection.bias);
    CHECK(same_bits(vit.forward(images).out, untouched.forward(images).out));
}

TEST_CASE("ConditionalRoutedViT: errors name the argument and both values") {
    const Cpu policy(1);
    const ViT<over_map> module(policy, Seed{1});
    CHECK_THROWS_WITH_AS(module(normal<double>(policy, std::array<Index, 4>{2, 2, 5, 4}, 0)),
                         "colt5: `height of the images` must be a multiple of patch_size, but is 5", ValueError);
    CHECK_THROWS_WITH_AS(module(normal<double>(policy, std::array<Index, 4>{2, 3, 4, 4}, 0)),
                         "colt5: `images` must have shape (any, 2, any, any), but has (2, 3, 4, 4)", ShapeError);
    auto gradients = module.make_gradients();
    auto saved = module.forward(normal<double>(policy, std::array<Index, 4>{2, 2, 4, 4}, 0));
    const auto d_out = normal<double>(policy, std::array<Index, 2>{2, 3}, 1);
    CHECK_THROWS_WITH_AS(module.backward(saved, normal<double>(policy, std::array<Index, 2>{2, 4}, 1), gradients),
                         "colt5: `d_out` must have shape (2, 3), but has (2, 4)", ShapeError);
    module.backward(std::move(saved), d_out, gradients);
    CHECK_THROWS_AS(module.backward(saved, d_out, gradients), ValueError);
}
