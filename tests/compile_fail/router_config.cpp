// SPDX-License-Identifier: MIT
// expect: colt5: RouterConfig.dim must be at least 1
// expect: colt5: RouterConfig.num_routing_tokens must be at least 1
// expect: colt5: router_kwargs.coor_descent.n_iters must be at least 1
// expect: colt5: router_kwargs.coor_descent.eps must be positive
// expect: colt5: router_kwargs.coor_descent.fetch_k_ratio must be at least 1
// expect: colt5: router_kwargs.cum_softmax.temperature must be positive
// expect: colt5: router_kwargs.sinkhorn.n_iters must be at least 1
// expect: colt5: router_kwargs.sinkhorn.temperature must be positive
// expect: colt5: router_kwargs.coor_descent.eps must be in [1e-6, 1e6]
// expect: colt5: router_kwargs.coor_descent.eps_init must be in [0, 1e6]
// expect: colt5: router_kwargs.coor_descent.eps_decay must be in (0, 1]
// expect: colt5: router_kwargs.coor_descent.fetch_k_ratio must be at most 1e6
// expect: colt5: router_kwargs.coor_descent.score_scale must be in [-1e6, 1e6]
// expect: colt5: router_kwargs.cum_softmax.temperature must be in [1e-6, 1e6]
// expect: colt5: router_kwargs.sinkhorn.temperature must be in [1e-6, 1e6]
// expect: colt5: router_kwargs.coor_descent.cosine_sim_scale must be in [1e-6, 1e6]
// expect: colt5: router_kwargs.cum_softmax.cosine_sim_scale must be in [1e-6, 1e6]
// expect: colt5: router_kwargs.sinkhorn.cosine_sim_scale must be in [1e-6, 1e6]
// expect: colt5: router_kwargs.causal.rate must be in [1e-9, 1]
// expect: colt5: router_kwargs.causal.burst must be 0 or in [1, 1e6]
// expect: colt5: router_kwargs.causal.block_size must be a power of two up to 1024
// expect: colt5: router_kwargs.causal.fetch_k_ratio must be in [1, 1e6]
// expect: colt5: router_kwargs.causal.eps must be in [1e-6, 1e6]
// expect: colt5: router_kwargs.causal.score_scale must be in [-1e6, 1e6]
// expect: colt5: router_kwargs.causal.cosine_sim_scale must be in [1e-6, 1e6]
#include <limits>

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
constexpr double endless = std::numeric_limits<double>::infinity(),
                 no_number = std::numeric_limits<double>::quiet_NaN();
constexpr RouterConfig small_eps{.dim = 8, .kwargs = {.coor_descent = {.eps = wrong(1e-40, 1e-6)}}};
constexpr RouterConfig eps_init{.dim = 8, .kwargs = {.coor_descent = {.eps_init = wrong(no_number, 4.0)}}};
constexpr RouterConfig eps_decay{.dim = 8, .kwargs = {.coor_descent = {.eps_decay = wrong(no_number, 0.5)}}};
constexpr RouterConfig large_ratio{.dim = 8, .kwargs = {.coor_descent = {.fetch_k_ratio = wrong(endless, 1e6)}}};
constexpr RouterConfig score_scale{.dim = 8, .kwargs = {.coor_descent = {.score_scale = wrong(endless, -1e6)}}};
constexpr RouterConfig large_softmax{.dim = 8, .kwargs = {.cum_softmax = {.temperature = wrong(endless, 1e6)}}};
constexpr RouterConfig small_sinkhorn{.dim = 8, .kwargs = {.sinkhorn = {.temperature = wrong(1e-30, 1e-6)}}};
constexpr RouterConfig cosine{.dim = 8, .kwargs = {.coor_descent = {.cosine_sim_scale = wrong(0.0, 8.0)}}};
constexpr RouterConfig cosine_softmax{.dim = 8, .kwargs = {.cum_softmax = {.cosine_sim_scale = wrong(-8.0, 8.0)}}};
constexpr RouterConfig cosine_sinkhorn{.dim = 8, .kwargs = {.sinkhorn = {.cosine_sim_scale = wrong(endless, 8.0)}}};
constexpr RouterConfig causal_rate{.dim = 8, .kwargs = {.causal = {.rate = wrong(1e-10, 1e-9)}}};
constexpr RouterConfig causal_burst{.dim = 8, .kwargs = {.causal = {.burst = wrong(0.5, 1.0)}}};
constexpr RouterConfig causal_block_size{.dim = 8, .kwargs = {.causal = {.block_size = wrong(24, 32)}}};
constexpr RouterConfig causal_fetch_k_ratio{.dim = 8, .kwargs = {.causal = {.fetch_k_ratio = wrong(0.5, 1.0)}}};
constexpr RouterConfig causal_eps{.dim = 8, .kwargs = {.causal = {.eps = wrong(0.0, 1.0)}}};
constexpr RouterConfig causal_score_scale{.dim = 8, .kwargs = {.causal = {.score_scale = wrong(endless, 1.0)}}};
constexpr RouterConfig causal_cosine_sim_scale{.dim = 8, .kwargs = {.causal = {.cosine_sim_scale = wrong(0.0, 8.0)}}};

static_assert(complete<colt5::CoordinateDescentRouter<cosine, float, Cpu>>);
static_assert(complete<colt5::DifferentiableTopKRouter<cosine_softmax, float, Cpu>>);
static_assert(complete<colt5::SinkhornRouter<cosine_sinkhorn, float, Cpu>>);
static_assert(complete<colt5::CoordinateDescentRouter<small_eps, float, Cpu>>);
static_assert(complete<colt5::CoordinateDescentRouter<eps_init, float, Cpu>>);
static_assert(complete<colt5::CoordinateDescentRouter<eps_decay, float, Cpu>>);
static_assert(complete<colt5::CoordinateDescentRouter<large_ratio, float, Cpu>>);
static_assert(complete<colt5::CoordinateDescentRouter<score_scale, float, Cpu>>);
static_assert(complete<colt5::DifferentiableTopKRouter<large_softmax, float, Cpu>>);
static_assert(complete<colt5::SinkhornRouter<small_sinkhorn, float, Cpu>>);
static_assert(complete<colt5::CoordinateDescentRouter<dim, float, Cpu>>);
static_assert(complete<colt5::CoordinateDescentRouter<num_routing_tokens, float, Cpu>>);
static_assert(complete<colt5::CoordinateDescentRouter<n_iters, float, Cpu>>);
static_assert(complete<colt5::CoordinateDescentRouter<eps, float, Cpu>>);
static_assert(complete<colt5::CoordinateDescentRouter<fetch_k_ratio, float, Cpu>>);
static_assert(complete<colt5::DifferentiableTopKRouter<softmax, float, Cpu>>);
static_assert(complete<colt5::SinkhornRouter<sinkhorn, float, Cpu>>);
static_assert(complete<colt5::SinkhornRouter<sinkhorn_temperature, float, Cpu>>);
static_assert(complete<colt5::CausalRouter<causal_rate, float, Cpu>>);
static_assert(complete<colt5::CausalRouter<causal_burst, float, Cpu>>);
static_assert(complete<colt5::CausalRouter<causal_block_size, float, Cpu>>);
static_assert(complete<colt5::CausalRouter<causal_fetch_k_ratio, float, Cpu>>);
static_assert(complete<colt5::CausalRouter<causal_eps, float, Cpu>>);
static_assert(complete<colt5::CausalRouter<causal_score_scale, float, Cpu>>);
static_assert(complete<colt5::CausalRouter<causal_cosine_sim_scale, float, Cpu>>);
