// SPDX-License-Identifier: MIT
#include <colt5/module/conditional_routed_attention.hpp>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr AttentionConfig with(RouterType type, bool straight_through, Index num_routed_kv) {
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
            .router_type = type};
}
constexpr AttentionConfig soft = with(RouterType::coor_descent, false, 2);
constexpr AttentionConfig by_softmax = with(RouterType::cum_softmax, false, 1);
constexpr AttentionConfig by_sinkhorn = with(RouterType::sinkhorn, false, 2);
template <AttentionConfig config, typename Scalar = double>
using Attention = ConditionalRoutedAttention<config, Scalar, Cpu>;

}  // namespace

TEST_CASE("ConditionalRoutedAttention: light for all; heavy of routed queries over routed keys, times the score") {
    const Cpu policy(2);
    const Attention<soft> module(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 9, 5}, 0);
    const auto some = mask_of_lengths(policy, {9, 6}, 9);
    for (const Mask mask : {Mask(), some.const_view()})
        for (const Index k : {1, 4, 12}) {
            auto expected = module.light_attn(policy, x, mask);
            const auto q = module.q_router.route(policy, x.const_view(), mask, k);
            const auto kv = module.kv_router.route(policy, x.const_view(), mask, 5);
            const auto kv_mask = gather_mask(policy, mask, kv.indices);
            for (Index b = 0; b < 2; ++b)
                for (Index i = 0; i < q.indices.extent(2); ++i) {
                    const Index token = q.indices.const_view()(b, 0, i);
                    // one query of one sequence at a time: keys of its own sequence
                    const TokensView<const double> query(&x.const_view()(b, token, 0), {1, 1, 5});
                    HostTensor<double, 4> context(policy, {1, 2, 5, 5});
                    for (Index r = 0; r < 2; ++r)
                        for (Index j = 0; j < 5; ++j)
                            std::copy_n(&x.const_view()(b, kv.indices.const_view()(b, r, j), 0), 5,
                                        &context.view()(0, r, j, 0));
                    const auto heavy = module.heavy_attn.forward(
                        policy, query, context, mask ? sequence(kv_mask, b) : KeyMask(), sequence(kv.scores, b));
                    for (Index e = 0; e < 5; ++e)
                        expected.view()(b, token, e) += q.scores.const_view()(b, 0, i) * heavy.out.data()[e];
                }
            CHECK(relative_error(module(x, mask, {.num_heavy_tokens_q = k, .num_heavy_tokens_kv = 5}), expected) <=
                  1e-12);
        }
    CHECK(same_bits(module(x), module(x, {}, {.num_heavy_tokens_q = 3, .num_heavy_tokens_kv = 4})));
}

TEST_CASE_TEMPLATE("ConditionalRoutedAttention: gradients by finite differences" * not_sanitized, Module,
                   Attention<soft>, Attention<by_softmax>) {
    const Cpu policy(1);
    Module module(policy, Seed{1});
    auto x = normal<double>(policy, std::array<Index, 3>{2, 9, 5}, 0, 0.7);
    const auto mask = mask_of_lengths(policy, {7, 2}, 9);
    check_gradients(module, x, {});
    check_gradients(module, x, mask.const_view());
    check_gradients(module, x, mask.const_view(), AttentionCounts{.num_heavy_tokens_q = 6, .num_heavy_tokens_kv = 2});
    for (const Index length : {1, 3}) {  // n <= k, and shorter than the window
        auto shorter = resized(policy, x, length);
        check_gradients(module, shorter, {});
        const auto shorter_mask = mask_of_lengths(policy, {length, 0}, length);
        check_gradients(module, shorter, shorter_mask.const_view());
    }
    // The routers take part: their gradients are not all zero.
    const auto saved = module.forward(x);
    auto gradients = module.make_gradients();
    module.backward(saved, x, gradients);
    CHECK(gradient_norm<Module>(gradients, "q_router.routing_token") > 1e-4);
    CHECK(gradient_norm<Module>(gradients, "kv_router.routing_token") > 1e-4);
}

TEST_CASE("ConditionalRoutedAttention: gradients through Sinkhorn routing by finite differences" * not_sanitized) {
    const Cpu policy(1);
    Attention<by_sinkhorn> module(policy, Seed{1});
    auto x = normal<double>(policy, std::array<Index, 3>{2, 9, 5}, 0, 0.7);
    const auto mask = mask_of_lengths(policy, {7, 2}, 9);  // fewer real tokens than slots
    HostTensor<double, 3> q_noise(policy, {2, 3, 9}), kv_noise(policy, {4, 4, 9});
    fill_with(policy, q_noise, [&](std::size_t i) { return Random(Seed{5}).gumbel(i); });
    fill_with(policy, kv_noise, [&](std::size_t i) { return Random(Seed{6}).gumbel(i); });
    module.q_router.noise = GumbelNoise<double>::given(q_noise.const_view());
    module.kv_router.noise = GumbelNoise<double>::given(kv_noise.const_view());
    check_gradients(module, x, {});
    check_gradients(module, x, mask.const_view());
}

TEST_CASE("ConditionalRoutedAttention: errors name the argument and both shapes or values") {
    const Cpu policy(1);
    const Attention<soft> module(policy);
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 4, 5}, 0);
    const auto wide = normal<double>(policy, std::array<Index, 3>{2, 4, 6}, 0);
    const auto longer = normal<double>(policy, std::array<Index, 3>{2, 5, 5}, 0);
    const auto mask = random_mask(policy, std::array<Index, 2>{1, 4}, 1);
    CHECK_THROWS_WITH_AS(module(wide), "colt5: `tokens` must have shape (any, any, 5), but has (2, 4, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(module.forward(x, mask.const_view()), "colt5: `mask` must have shape (2, 4), but has (1, 4)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(module(x, {}, {.num_heavy_tokens_q = 0}), "colt5: `num_heavy_tokens_q` must be >= 1, but is 0",
                         ValueError);
    CHECK_THROWS_WITH_AS(module(x, {}, {.num_heavy_tokens_kv = -2}),
                         "colt5: `num_heavy_tokens_kv` must be >= 1, but is -2", ValueError);
    const auto saved = module.forward(x);
    auto gradients = module.make_gradients();
    CHECK_THROWS_WITH_AS(module.backward(saved, longer, gradients),
                         "colt5: `d_out` must have shape (2, 4, 5), but has (2, 5, 5)", ShapeError);
}
