// SPDX-License-Identifier: MIT
// expect: colt5: the router template does not meet the Router concept
#include "wrong.hpp"

template <colt5::RouterConfig config, typename Scalar, typename P>
struct NoRouter {
    explicit NoRouter(const P&, colt5::SeedSequence&) {}
    struct Gradients {};
    struct Activations {
        colt5::Routing<colt5::accumulate_t<Scalar>, P> routing;
    };
    Activations forward(const P&, colt5::TokensView<const Scalar>, colt5::Mask, colt5::Index) const;
};

#ifdef COLT5_COMPILE_FAIL_CONTROL
template <colt5::RouterConfig config, typename Scalar, typename P>
using MyRouter = colt5::CoordinateDescentRouter<config, Scalar, P>;
#else
template <colt5::RouterConfig config, typename Scalar, typename P>
using MyRouter = NoRouter<config, Scalar, P>;
#endif

constexpr colt5::FeedForwardConfig config{.dim = 8, .num_heavy_tokens = 2};
static_assert(complete<colt5::ConditionalRoutedFeedForward<config, float, colt5::Cpu, MyRouter>>);
