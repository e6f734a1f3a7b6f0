// SPDX-License-Identifier: MIT
// expect: colt5: RouterConfig.dim must be at least 1
// expect: colt5: RouterConfig.num_routing_tokens must be at least 1
// expect: colt5: router_kwargs.coor_descent.n_iters must be at least 1
// expect: colt5: router_kwargs.coor_descent.eps must be positive
// expect: colt5: router_kwargs.coor_descent.fetch_k_ratio must be at least 1
// expect: colt5: router_kwargs.cum_softmax.temperature must be positive
// expect: colt5: router_kwargs.sinkhorn.n_iters must be at least 1
// expect: colt5: router_kwargs.sinkhorn.temperature must be positive
#include "wrong.hpp"

using colt5::Cpu, colt5::RouterConfig;

constexpr RouterConfig dim{.dim = wrong(0, 8)};
constexpr RouterConfig num_routing_tokens{.dim = 8, .num_routing_tokens = wrong(0, 1)};
constexpr RouterConfig n_iters{.dim = 8, .kwargs = {.coor_descent = {.n_iters = wrong(0, 50)}}};
constexpr RouterConfig eps{.dim = 8, .kwargs = {.coor_descent = {.eps = wrong(0.0, 1.0)}}};
constexpr RouterConfig fetch_k_ratio{.dim = 8, .kwargs = {.coor_descent = {.fetch_k_ratio = wrong(0.5, 1.0)}}};
constexpr RouterConfig softmax{.dim = 8, .kwargs = {.cum_softmax = {.temperature = wrong(0.0, 1.0)}}};
constexpr RouterConfig sinkhorn{.dim = 8, .kwargs = {.sinkhorn = {.n_iters = wrong(0, 8)}}};
constexpr RouterConfig sinkhorn_temperature{.dim = 8, .kwargs = {.sinkhorn = {.temperature = wrong(-1.0, 0.7)}}};

static_assert(complete<colt5::CoordinateDescentRouter<dim, float, Cpu>>);
static_assert(complete<colt5::CoordinateDescentRouter<num_routing_tokens, float, Cpu>>);
static_assert(complete<colt5::CoordinateDescentRouter<n_iters, float, Cpu>>);
static_assert(complete<colt5::CoordinateDescentRouter<eps, float, Cpu>>);
static_assert(complete<colt5::CoordinateDescentRouter<fetch_k_ratio, float, Cpu>>);
static_assert(complete<colt5::DifferentiableTopKRouter<softmax, float, Cpu>>);
static_assert(complete<colt5::SinkhornRouter<sinkhorn, float, Cpu>>);
static_assert(complete<colt5::SinkhornRouter<sinkhorn_temperature, float, Cpu>>);
