// SPDX-License-Identifier: MIT
#include <array>
#include <vector>

#include <colt5/colt5.hpp>

#include "module/decode.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr FeedForwardConfig config{.dim = 20,
                                   .num_heavy_tokens = 40,
                                   .router_straight_through = false,
                                   .router_type = RouterType::causal,
                                   .router_kwargs = {.causal = {.rate = 0.2, .block_size = 16, .score_scale = 0.3}}};
constexpr FeedForwardConfig gated{.dim = 17,
                                  .num_heavy_tokens = 1000,
                                  .feed_forward = FeedForwardType::gated,
                                  .router_type = RouterType::causal,
                                  .router_kwargs = {.causal = {.rate = 0.5, .cosine_sim_routing = true}}};
template <FeedForwardConfig c, typename T>
using Module = ConditionalRoutedFeedForward<c, T, Cpu>;

}  // namespace

TEST_CASE_TEMPLATE("decode of a feedforward", M, Module<config, float>, Module<config, double>, Module<gated, float>) {
    check_decode<M>(300);
}

TEST_CASE("decode of routes with heavy modules of their own") {
    constexpr RoutedConfig routed{.dim = 12,
                                  .num_heavy_tokens = 30,
                                  .num_routes = 2,
                                  .sequence_order = true,
                                  .router_type = RouterType::causal,
                                  .router_kwargs = {.causal = {.rate = 0.3, .block_size = 8}}};
    check_decode<Routed<routed, float, Cpu, SizedFeedForward<12, 24, float, Cpu>>>(100);
}
