// SPDX-License-Identifier: MIT
#include <set>
#include <string>

#include "module/invariances.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr AttentionConfig with(RouterType type, bool has_light_attn, bool straight_through, Index num_routed_kv) {
    return {.dim = 5,
            .num_heavy_tokens_q = 3,
            .num_heavy_tokens_kv = 4,
            .num_routed_kv = num_routed_kv,
            .light_dim_head = 2,
            .light_heads = 2,
            .light_window_size = 4,
            .heavy_dim_head = 3,
            .heavy_heads = 2,
            .router_straight_through = straight_through,
            .router_type = type,
            .has_light_attn = has_light_attn,
            .use_null_kv = true,
            .use_null_q_tokens = true,
            .multiply_keys_by_score = true,
            .multiply_queries_by_score = true};
}
constexpr AttentionConfig all_options = with(RouterType::coor_descent, true, false, 2);
constexpr AttentionConfig heavy_only = with(RouterType::coor_descent, false, false, 1);
constexpr AttentionConfig by_softmax = with(RouterType::cum_softmax, true, false, 1);
constexpr AttentionConfig by_sinkhorn = with(RouterType::sinkhorn, false, false, 2);
constexpr AttentionConfig nothing_but_heavy = [] {
    AttentionConfig config = heavy_only;
    config.use_null_kv = config.use_null_q_tokens = false;
    config.multiply_keys_by_score = config.multiply_queries_by_score = false;
    return config;
}();
constexpr AttentionConfig null_for_masked = [] {
    AttentionConfig config = heavy_only;
    config.masked_tokens_get_null_q = true;
    return config;
}();
constexpr AttentionConfig scores_of_values = [] {
    AttentionConfig config = with(RouterType::coor_descent, true, false, 2);
    config.multiply_keys_by_score = config.multiply_queries_by_score = false;
    return config;
}();
constexpr AttentionConfig without_null = [] {
    AttentionConfig config = scores_of_values;
    config.use_null_kv = config.use_null_q_tokens = false;
    return config;
}();
template <AttentionConfig config, typename Scalar = double>
using Attention = ConditionalRoutedAttention<config, Scalar, Cpu>;

constexpr CrossAttentionConfig cross{.dim = 5,
                                     .num_tokens_q = 3,
                                     .num_tokens_kv = 4,
                                     .dim_head = 3,
                                     .heads = 2,
                                     .router_straight_through = false,
                                     .kv_routing_tokens = 2,
                                     .use_null_kv = true,
                                     .use_null_q_tokens = true,
                                     .multiply_keys_by_score = true};
using Cross = ConditionalRoutedCrossAttention<cross, double, Cpu>;

template <typename Module>
std::set<std::string> names_of(const Module& module) {
    std::set<std::string> names;
    Module::each_parameter([&](const std::string& name, const auto&) { names.insert(name); }, "", module);
    return names;
}

constexpr TransformerBlockConfig block_config(bool has_light_attn) {
    TransformerBlockConfig config = invariance_config(RouterType::coor_descent);
    config.has_light_attn = has_light_attn;
    config.use_null_kv = config.use_null_q_tokens = true;
    config.multiply_keys_by_score = config.multiply_queries_by_score = true;
    return config;
}
constexpr TransformerBlockConfig with_light = block_config(true), without_light = block_config(false);
template <TransformerBlockConfig config, typename Scalar = double>
using Block = ConditionalRoutedTransformerBlock<config, Scalar, Cpu>;

}  // namespace

TEST_CASE_TEMPLATE("null tokens: gradients of attention by finite differences" * not_sanitized, Module,
                   Attention<all_options>, Attention<heavy_only>, Attention<by_softmax>, Attention<nothing_but_heavy>,
                   Attention<null_for_masked>) {
    const Cpu policy(1);
    Module module(policy, Seed{1});
    auto x = normal<double>(policy, std::array<Index, 3>{2, 9, 5}, 0, 0.7);
    const auto mask = mask_of_lengths(policy, {7, 2}, 9);
    check_gradients(module, x, {});
    check_gradients(module, x, mask.const_view());
    check_gradients(module, x, mask.const_view(), AttentionCounts{.num_heavy_tokens_q = 6, .num_heavy_tokens_kv = 2});
    check_gradients(module, x, mask.const_view(), AttentionCounts{}, Residual::tokens);
    auto shorter = resized(policy, x, 3);  // n <= k
    check_gradients(module, shorter, {});
}

TEST_CASE("null tokens: gradients through Sinkhorn routing by finite differences" * not_sanitized) {
    const Cpu policy(1);
    Attention<by_sinkhorn> module(policy, Seed{1});
    auto x = normal<double>(policy, std::array<Index, 3>{2, 9, 5}, 0, 0.7);
    const auto mask = mask_of_lengths(policy, {7, 2}, 9);
    HostTensor<double, 3> q_noise(policy, {2, 3, 9}), kv_noise(policy, {4, 4, 9});
    fill_with(policy, q_noise, [&](std::size_t i) { return Random(Seed{5}).gumbel(i); });
    fill_with(policy, kv_noise, [&](std::size_t i) { return Random(Seed{6}).gumbel(i); });
    module.q_router.noise = GumbelNoise<double>::given(q_noise.const_view());
    module.kv_router.noise = GumbelNoise<double>::given(kv_noise.const_view());
    check_gradients(module, x, {});
    check_gradients(module, x, mask.const_view());
}

TEST_CASE("null tokens: gradients of cross attention by finite differences" * not_sanitized) {
    const Cpu policy(1);
    Cross module(policy, Seed{1});
    check_cross_gradients(policy, module, 5);
}

TEST_CASE("null tokens: the heavy branch alone writes what was routed, the null token, and zeros for padding") {
    const Cpu policy(1);
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 9, 5}, 0);
    const auto mask = mask_of_lengths(policy, {9, 6}, 9);
    const auto check = [&]<AttentionConfig config>(const Attention<config>& module) {
        const auto saved = module.forward(x, mask.const_view());
        for (Index b = 0; b < 2; ++b)
            for (Index i = 0; i < 9; ++i) {
                const auto indices = single_route(saved.routed_q.routing.indices);
                bool routed = false;
                for (Index k = 0; k < indices.extent(1); ++k) routed = routed || indices(b, k) == i;
                if (routed) continue;
                const bool gets_null =
                    config.use_null_q_tokens && (mask.const_view()(b, i) || config.masked_tokens_get_null_q);
                for (Index j = 0; j < 5; ++j)
                    CHECK(saved.out.const_view()(b, i, j) == (gets_null ? module.null_q_token.data()[j] : 0));
            }
    };
    check(Attention<heavy_only>(policy, Seed{1}));
    check(Attention<null_for_masked>(policy, Seed{1}));
    check(Attention<nothing_but_heavy>(policy, Seed{1}));
}

TEST_CASE("null tokens: with a key that nobody resembles, and a null query of 0, nothing changes") {
    const Cpu policy(2);
    Attention<scores_of_values> module(policy, Seed{1});
    const Attention<without_null> without(policy, Seed{1});
    fill(policy, module.null_q_token, 0);
    fill(policy, module.heavy_attn.null_kv, 0);  // a key of weight exp(0) and a value of 0
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 40, 5}, 0);
    const auto keys = AttentionCounts{.num_heavy_tokens_kv = 30};
    CHECK(relative_error(module(x, {}, keys), without(x, {}, keys)) > 1e-6);
    fill(policy, module.heavy_attn.to_q.weight, 0);  // all keys have the same weight: 30 of 31 are the tokens'
    Attention<without_null> uniform(policy, Seed{1});
    fill(policy, uniform.heavy_attn.to_q.weight, 0);
    assign(policy, uniform.heavy_attn.to_out.weight, uniform.heavy_attn.to_out.weight * (30.0 / 31));
    CHECK(relative_error(module(x, {}, keys), uniform(x, {}, keys)) <= 1e-13);
}

TEST_CASE("null tokens: parameters have the names of the reference, and only those that exist") {
    const Cpu policy(1);
    const std::set<std::string> heavy{"q_router.routing_token", "kv_router.routing_token", "heavy_attn.norm.gamma",
                                      "heavy_attn.to_q.weight", "heavy_attn.to_kv.weight", "heavy_attn.to_out.weight"};
    CHECK(names_of(Attention<nothing_but_heavy>(policy)) == heavy);
    auto with_null = heavy;
    with_null.insert({"null_q_token", "heavy_attn.null_kv"});
    CHECK(names_of(Attention<heavy_only>(policy)) == with_null);
    CHECK(names_of(Cross(policy)) == with_null);
    with_null.insert(
        {"light_attn.norm.weight", "light_attn.norm.bias", "light_attn.to_qkv.weight", "light_attn.to_out.weight"});
    CHECK(names_of(Attention<all_options>(policy)) == with_null);

    Attention<all_options> module(policy);
    module.heavy_attn.null_kv = {policy, {2, 2, 4}};
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 9, 5}, 0);
    CHECK_THROWS_WITH_AS(module(x), "colt5: `heavy_attn.null_kv` must have shape (2, 2, 3), but has (2, 2, 4)",
                         ShapeError);
}

TEST_CASE("null tokens: clones and gradients have them") {
    const Cpu policy(1);
    const Attention<all_options> module(policy, Seed{4});
    const auto copy = clone(policy, module);
    CHECK(same_bits(copy.null_q_token, module.null_q_token));
    CHECK(same_bits(copy.heavy_attn.null_kv, module.heavy_attn.null_kv));
    CHECK(module.fits(module.make_gradients()));
    auto gradients = module.make_gradients();
    gradients.null_q_token = {};
    CHECK(!module.fits(gradients));
}

TEST_CASE_TEMPLATE("invariances, null tokens: batched equals one at a time, bit for bit", Module,
                   Block<with_light, float>, Block<without_light>) {
    check_batched_equals_alone<Module>();
}
TEST_CASE_TEMPLATE("invariances, null tokens: padding never changes a real token", Module, Block<with_light, float>,
                   Block<without_light>) {
    check_padding_is_not_seen<Module>();
}
TEST_CASE_TEMPLATE("invariances, null tokens: padding may hold anything", Module, Block<with_light, float>,
                   Block<without_light>) {
    check_padding_may_hold_anything<Module>();
}
TEST_CASE_TEMPLATE("invariances, null tokens: the same bits from run to run and with any number of threads", Module,
                   Block<with_light, float>, Block<without_light>) {
    check_threads_change_nothing<Module>();
}
