// SPDX-License-Identifier: MIT
/// A user's own router works in every module.
#include <set>

#include "module/checks.hpp"
#include "router/norm_router.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr TransformerBlockConfig config{
    .dim = 5,
    .num_heavy_attn_tokens_q = 3,
    .num_heavy_attn_tokens_kv = 4,
    .num_routed_kv = 2,
    .num_heavy_ff_tokens = 2,
    .light_dim_head = 2,
    .light_heads = 2,
    .light_window_size = 4,
    .heavy_dim_head = 3,
    .heavy_heads = 2,
    .heavy_ff_mult = 1.5,
    .router_straight_through = false,
};
constexpr CrossAttentionConfig cross_config{.dim = 5,
                                            .num_tokens_q = 3,
                                            .num_tokens_kv = 4,
                                            .dim_head = 3,
                                            .heads = 2,
                                            .router_straight_through = false,
                                            .kv_routing_tokens = 2};
using Block = ConditionalRoutedTransformerBlock<config, double, Cpu, NormRouter>;
using Cross = ConditionalRoutedCrossAttention<cross_config, double, Cpu, NormRouter>;

template <typename Module>
void check(Module& module) {
    const Cpu& policy = module.policy();
    auto x = normal<double>(policy, std::array<Index, 3>{2, 7, 5}, 0, 0.7);
    const auto mask = mask_of_lengths(policy, {5, 2}, 7);
    check_gradients(module, x, {});
    check_gradients(module, x, mask.const_view());
}

}  // namespace

TEST_CASE("a user's router: ConditionalRoutedFeedForward") {
    Block::FeedForward module(Cpu(1), Seed{1});
    check(module);
    const auto x = normal<double>(module.policy(), std::array<Index, 3>{1, 7, 5}, 0);
    const auto saved = module.forward(x);
    auto gradients = module.make_gradients();
    module.backward(saved, x, gradients);
    CHECK(gradient_norm<Block::FeedForward>(gradients, "router.weight") > 1e-4);
}

TEST_CASE("a user's router: ConditionalRoutedAttention") {
    Block::Attention module(Cpu(1), Seed{1});
    check(module);
    CHECK(module.kv_router.weight.extent(0) == 2);
    const auto x = normal<double>(module.policy(), std::array<Index, 3>{1, 7, 5}, 0);
    const auto saved = module.forward(x);
    auto gradients = module.make_gradients();
    module.backward(saved, x, gradients);
    CHECK(gradient_norm<Block::Attention>(gradients, "q_router.weight") > 1e-4);
    CHECK(gradient_norm<Block::Attention>(gradients, "kv_router.weight") > 1e-4);
}

TEST_CASE("a user's router: ConditionalRoutedTransformerBlock") {
    Block module(Cpu(1), Seed{1});
    check(module);
    std::set<std::string> names;
    Block::each_parameter([&](const std::string& name, const auto&) { names.insert(name); }, "", module);
    CHECK(names.count("conditional_ff.router.weight") == 1);
    CHECK(names.count("conditional_attn.kv_router.weight") == 1);
}

TEST_CASE("a user's router: ConditionalRoutedCrossAttention") {
    const Cpu policy(1);
    Cross module(policy, Seed{1});
    auto x = normal<double>(policy, std::array<Index, 3>{2, 7, 5}, 0, 0.7);
    auto context = normal<double>(policy, std::array<Index, 3>{2, 8, 5}, 1, 0.7);
    const auto mask = mask_of_lengths(policy, {5, 2}, 7);
    const auto context_mask = mask_of_lengths(policy, {3, 8}, 8);
    for (const bool masked : {false, true}) {
        const Mask x_mask = masked ? mask.const_view() : Mask();
        const Mask c_mask = masked ? context_mask.const_view() : Mask();
        const auto d_out = normal<double>(policy, x.shape(), 99);
        const auto saved = module.forward(x, context, x_mask, c_mask);
        auto gradients = module.make_gradients();
        const auto d = module.backward(saved, d_out, gradients);
        const auto loss = [&] { return inner(d_out, module(x, context, x_mask, c_mask)); };
        CHECK(gradient_error(d.d_x, finite_differences(policy, x, loss)) <= gradient_tolerance);
        CHECK(gradient_error(d.d_context, finite_differences(policy, context, loss)) <= gradient_tolerance);
        check_parameter_gradients(policy, module, gradients, loss);
        CHECK(gradient_norm<Cross>(gradients, "q_router.weight") > 1e-4);
        CHECK(gradient_norm<Cross>(gradients, "kv_router.weight") > 1e-4);
    }
}
