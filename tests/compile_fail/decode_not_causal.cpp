// SPDX-License-Identifier: MIT
// expect: colt5: decode needs a causal router, such as RouterType::causal
#include <colt5/colt5.hpp>

using namespace colt5;

#ifdef COLT5_COMPILE_FAIL_CONTROL
constexpr RouterType router_type = RouterType::causal;
#else
constexpr RouterType router_type = RouterType::coor_descent;
#endif
constexpr FeedForwardConfig config{.dim = 8, .num_heavy_tokens = 4, .router_type = router_type};

auto cache_of(const ConditionalRoutedFeedForward<config, float, Cpu>& feedforward) {
    return feedforward.make_cache(1, 10);
}
