// SPDX-License-Identifier: MIT
// expect: colt5: FeedForwardConfig.dim must be at least 1
// expect: colt5: FeedForwardConfig.num_heavy_tokens must be at least 1
// expect: colt5: FeedForwardConfig.light_ff_mult times dim must be at least 1
// expect: colt5: FeedForwardConfig.heavy_ff_mult times dim must be at least 1 and at most 2^40
#include "wrong.hpp"

template <colt5::FeedForwardConfig config>
using Module = colt5::ConditionalRoutedFeedForward<config, float, colt5::Cpu>;
using Config = colt5::FeedForwardConfig;

constexpr Config dim{.dim = wrong(0, 8), .num_heavy_tokens = 2};
constexpr Config num_heavy_tokens{.dim = 8, .num_heavy_tokens = wrong(0, 2)};
constexpr Config light_ff_mult{.dim = 8, .num_heavy_tokens = 2, .light_ff_mult = wrong(0.1, 0.5)};
constexpr Config heavy_ff_mult{.dim = 8, .num_heavy_tokens = 2, .heavy_ff_mult = wrong(1e30, 4.0)};

static_assert(complete<Module<dim>> && complete<Module<num_heavy_tokens>>);
static_assert(complete<Module<light_ff_mult>> && complete<Module<heavy_ff_mult>>);
