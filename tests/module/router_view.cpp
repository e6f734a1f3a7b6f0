// SPDX-License-Identifier: MIT
/// What the saved activations tell of each router.
#include <colt5/router/router_view.hpp>

#include <limits>
#include <map>
#include <type_traits>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr Index dim = 8;
constexpr TransformerBlockConfig config_with(RouterType type) {
    return {.dim = dim,
            .num_heavy_attn_tokens_q = 3,
            .num_heavy_attn_tokens_kv = 4,
            .num_routed_kv = 2,
            .num_heavy_ff_tokens = 5,
            .light_dim_head = 4,
            .light_heads = 2,
            .light_window_size = 4,
            .heavy_dim_head = 4,
            .heavy_heads = 2,
            .router_straight_through = false,
            .router_type = type};
}
constexpr TransformerBlockConfig by_descent = config_with(RouterType::coor_descent),
                                 by_softmax = config_with(RouterType::cum_softmax),
                                 by_sinkhorn = config_with(RouterType::sinkhorn);
/// In blocks of the sequence, whole ones or not, with routes of queries.
constexpr TransformerBlockConfig in_blocks(RouterType type, Index size) {
    TransformerBlockConfig config = config_with(type);
    config.num_routed_q = 2;
    config.router_kwargs.route_block_size = size;
    return config;
}
constexpr TransformerBlockConfig in_partial_blocks = in_blocks(RouterType::coor_descent, 5),
                                 in_whole_blocks = in_blocks(RouterType::cum_softmax, 4),
                                 in_blocks_by_sinkhorn = in_blocks(RouterType::sinkhorn, 7);
constexpr CrossAttentionConfig cross_config{
    .dim = dim, .num_tokens_q = 3, .num_tokens_kv = 4, .dim_head = 4, .heads = 2, .kv_routing_tokens = 2};
constexpr RoutedConfig experts_config{.dim = dim, .num_heavy_tokens = 5, .num_routes = 3, .sequence_order = true};
template <TransformerBlockConfig config>
using Block = ConditionalRoutedTransformerBlock<config, double, Cpu>;
using Cross = ConditionalRoutedCrossAttention<cross_config, double, Cpu>;
using Experts = Routed<experts_config, double, Cpu, SizedFeedForward<dim, 9, double, Cpu>>;

/// The view of every router, by name, holds what each_routing shows, and its summary is what loops over the chosen
/// tokens find.
template <typename Activations>
void check_views(const Cpu& policy, const Activations& saved, Mask mask) {
    std::map<std::string, const TokenIndex*> routings;
    saved.each_routing([&](const std::string& name, const auto& routing) { routings[name] = routing.indices.data(); },
                       "m.");
    std::size_t views = 0;
    saved.each_router(
        [&](const std::string& name, const RouterView<double>& view) {
            CAPTURE(name);
            ++views;
            CHECK(routings.at(name) == view.indices.data());
            const auto [batch, routes, picks] = view.indices.shape();
            REQUIRE(view.scores.shape() == view.indices.shape());
            REQUIRE(view.logits.shape() == std::array{batch, routes, Index{12}});
            CHECK(view.mask.data() == mask.data());
            const auto summary = summarize(policy, view);
            REQUIRE(summary.live.shape() == std::array{batch, routes});
            REQUIRE(summary.thresholds.shape() == std::array{batch, routes});
            for (Index b = 0; b < batch; ++b)
                for (Index r = 0; r < routes; ++r) {
                    double live = 0, least = std::numeric_limits<double>::infinity();
                    for (Index i = 0; i < picks; ++i) {
                        const Index token = view.indices(b, r, i);
                        if (mask && !mask(b, token)) continue;
                        live += 1;
                        least = std::min(least, view.logits(b, r, token));
                    }
                    CHECK(summary.live.const_view()(b, r) == live);
                    CHECK(summary.thresholds.const_view()(b, r) == least);
                }
        },
        "m.");
    CHECK(views == routings.size());
}

}  // namespace

TEST_CASE_TEMPLATE("each_router: indices, scores and logits as saved; live tokens and thresholds", Module,
                   Block<by_descent>, Block<by_softmax>, Block<by_sinkhorn>, Block<in_partial_blocks>,
                   Block<in_whole_blocks>, Block<in_blocks_by_sinkhorn>, Experts, Cross) {
    const Cpu policy(2);
    const Module module(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{3, 12, dim}, 0);
    const auto some = mask_of_lengths(policy, {12, 2, 0}, 12);
    for (const Mask mask : {Mask(), some.const_view()})
        if constexpr (std::is_same_v<Module, Cross>)
            check_views(policy, module.forward(x, x, mask, mask), mask);
        else
            check_views(policy, module.forward(x, mask), mask);
}

TEST_CASE("each_router: the logits are those of the routing token, the threshold parts the chosen from the others") {
    const Cpu policy(1);
    const Block<by_descent>::FeedForward module(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 12, dim}, 0);
    int routers = 0;
    module.forward(x).each_router([&](const std::string& name, const RouterView<double>& view) {
        ++routers;
        CHECK(name == "router");
        CHECK(relative_error(view.logits, route_logits(policy, x, module.router.routing_token)) == 0);
        const auto [live, thresholds] = summarize(policy, view);
        for (Index b = 0; b < 2; ++b) {
            Index above = 0;
            for (Index i = 0; i < 12; ++i) above += view.logits(b, 0, i) >= thresholds.const_view()(b, 0);
            CHECK(above == 5);
            CHECK(live.const_view()(b, 0) == 5);
        }
    });
    CHECK(routers == 1);
}

TEST_CASE("each_router: the logits of a router in blocks are those of the sequence") {
    const Cpu policy(1);
    const Block<in_partial_blocks>::Attention module(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 12, dim}, 0);
    const auto mask = mask_of_lengths(policy, {12, 7}, 12);
    module.forward(x, mask.const_view()).each_router([&](const std::string& name, const RouterView<double>& view) {
        const auto& tokens =
            name == "q_router" ? module.q_router.inner.routing_token : module.kv_router.inner.routing_token;
        CHECK(relative_error(view.logits, route_logits(policy, x, tokens)) <= 1e-14);
    });
}

TEST_CASE("router_view: a router that saves no logits has no thresholds") {
    const Cpu policy(1);
    struct {
        Routing<float, Cpu> routing;
    } routed{{{policy, {1, 2, 3}}, {policy, {1, 2, 3}}}};
    fill_with(policy, routed.routing.indices, [](std::size_t i) { return i; });
    fill(policy, routed.routing.scores, 1);
    const auto mask = mask_of_lengths(policy, {4}, 6);
    const auto view = router_view(routed, mask.const_view());
    CHECK(!view.logits);
    const auto summary = summarize(policy, view);
    CHECK(!summary.thresholds);
    CHECK(summary.live.const_view()(0, 0) == 3);
    CHECK(summary.live.const_view()(0, 1) == 1);
}
