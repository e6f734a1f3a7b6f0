// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <string>
#include <utility>

#include <colt5/core/random.hpp>
#include <colt5/op/coordinate_descent.hpp>
#include <colt5/op/gather.hpp>
#include <colt5/op/sinkhorn.hpp>

namespace colt5 {

/// Settings of CoordinateDescentRouter.
struct CoordinateDescentKwargs {
    int n_iters = 50;
    double fetch_k_ratio = 9.0 / 8;  ///< the descent asks for this many times the tokens, "for better learning"
    double eps = 1;
    double eps_init = 0;   ///< first ε of ε-scaling; 0: none
    double eps_decay = 1;  ///< from step to step
    DescentStart start = DescentStart::zero;
    /// Multiplies the logits. At the reference's initialization they have a deviation of about √dim, at which the
    /// descent saturates and the router has no gradient: 1/√dim is what to train with.
    double score_scale = 1;
    /// Solves for the threshold instead of making n_iters steps; see CoordinateDescent. What to train with, too. Where
    /// logits come to spread widely, a fetch_k_ratio above 1 puts all the chosen tokens above the threshold again, and
    /// 1 does not.
    bool iterate_to_convergence = false;
    bool cosine_sim_routing = false;  ///< logits are cosines of the angle to the routing token; see cosine_logits
    double cosine_sim_scale = 8;      ///< multiplies the cosines
    /// A sequence of at most as many real tokens as are asked for is not routed, as in colt5-attention 0.11: all of
    /// them score 1, and the router has no gradient from them.
    bool short_rows_score_one = false;

    /// The defaults of colt5-attention 0.11: ε-scaling, 20 steps from b = −s, short sequences not routed.
    static constexpr CoordinateDescentKwargs version_0_11() {
        return {.n_iters = 20,
                .eps = 0.03,
                .eps_init = 4,
                .eps_decay = 0.7,
                .start = DescentStart::minus_logits,
                .short_rows_score_one = true};
    }
};

/// Settings of DifferentiableTopKRouter.
struct CumulativeSoftmaxKwargs {
    double temperature = 1;
    bool cosine_sim_routing = false;  ///< logits are cosines of the angle to the routing token; see cosine_logits
    double cosine_sim_scale = 8;      ///< multiplies the cosines
    /// A sequence of at most as many real tokens as are asked for is not routed, as in colt5-attention 0.11: all of
    /// them score 1, and the router has no gradient from them.
    bool short_rows_score_one = false;
};

/// Settings of SinkhornRouter; see Sinkhorn.
struct SinkhornKwargs {
    int n_iters = 8;
    double temperature = 0.7;
    bool masked_tokens_take_part = false;
    bool cosine_sim_routing = false;  ///< logits are cosines of the angle to the routing token; see cosine_logits
    double cosine_sim_scale = 8;      ///< multiplies the cosines
};

/// The reference's router_kwargs, for each of its routers; a router reads its own.
struct RouterKwargs {
    CoordinateDescentKwargs coor_descent{};
    CumulativeSoftmaxKwargs cum_softmax{};
    SinkhornKwargs sinkhorn{};
};

/// The reference's router_type.
enum class RouterType { coor_descent, cum_softmax, sinkhorn };

/// What a module tells its router at compile time.
struct RouterConfig {
    Index dim;
    Index num_routing_tokens = 1;
    bool straight_through = true;
    RouterType router_type = RouterType::coor_descent;  ///< read by ConfiguredRouter only
    RouterKwargs kwargs{};
};

/// Which tokens go to the heavy branch, and what their output is multiplied by.
template <typename Logit, Policy P>
struct Routing {
    Tensor<TokenIndex, P, dynamic, dynamic, dynamic> indices;  // (b, r, k)
    Tensor<Logit, P, dynamic, dynamic, dynamic> scores;        // (b, r, k); 0 for masked tokens
};

/// What forward of a router returns: `.routing`, and what its backward reads.
template <typename R, typename Scalar, typename P>
using RouterActivations =
    decltype(std::declval<const R&>().forward(std::declval<const P&>(), TokensView<const Scalar>(), Mask(), Index()));

/// What a module reads of a router that evaluates.
template <typename Logit, Policy P>
struct Evaluated {
    Routing<Logit, P> routing;
};

/// `forward` of a router if backward is to follow, otherwise `route`; x (b, n, d). Either has `.routing`.
template <bool save, typename R, typename Scalar, Policy P>
auto run_router(const R& router, const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens) {
    if constexpr (save)
        return router.forward(policy, x, mask, num_tokens);
    else
        return Evaluated<accumulate_t<Scalar>, P>{router.route(policy, x, mask, num_tokens)};
}

/// A router of one routing token gives (b, 1, k): seen as (b, k).
template <typename T>
auto single_route(const T& tensor) {
    expect_shape("routing", tensor.shape(), {dynamic, 1, dynamic});
    return tensor.const_view().reshape(std::array<Index, 2>{tensor.extent(0), tensor.extent(2)});
}

namespace detail {
struct VisitNothing {
    template <typename... T>
    void operator()(const std::string&, T&...) const {}
};
}  // namespace detail

/// A class template over <RouterConfig, Scalar, Policy> whose instances meet this can be the router of every module:
///
///     R(policy, seeds)                       draws its parameters from the SeedSequence
///     R::picks_repeat                        constant: two picks of a row may be the same token (outputs are averaged)
///     router.route(policy, x, mask, k)       Routing for x (b, n, d), mask (b, n) or absent: at most k tokens a route.
///                                            For evaluation: same inputs, same bits, and nothing changes
///     router.forward(policy, x, mask, k)     the same in `.routing`, with what backward reads beside it. For training:
///                                            a router may draw noise, and count its calls
///     router.backward(policy, saved, d_scores, x, mask, d_x, gradients)
///                                            d_scores (b, r, k); d_x (b, n, d) and the gradients accumulate
///     R::Gradients                           default-constructible, with the same members as the parameters of R
///     R::each_parameter(f, prefix, r...)     calls f(prefix + name, tensor...) for each parameter of the routers or
///                                            Gradients r..., side by side; a router with a state shows it to an f
///                                            that asks (see StateVisitor)
///
/// Indices are distinct within a row unless picks_repeat. With straight_through the score of a real token is exactly 1
/// and the gradient that of the score. Logits are float or double whatever x is: accumulate_t<Scalar>.
template <typename R, typename Scalar, typename P>
concept Router = Policy<P> && std::constructible_from<R, const P&, SeedSequence&> &&
    std::default_initializable<typename R::Gradients> &&
    requires(const R& router, const P& policy, TokensView<const Scalar> x, Mask mask, Index k,
             TokensView<const accumulate_t<Scalar>> d_scores, TokensView<Scalar> d_x, typename R::Gradients& gradients,
             R& parameters) {
    { R::picks_repeat } -> std::convertible_to<bool>;
    { router.route(policy, x, mask, k) } -> std::same_as<Routing<accumulate_t<Scalar>, P>>;
    { router.forward(policy, x, mask, k).routing } -> std::convertible_to<const Routing<accumulate_t<Scalar>, P>&>;
    router.backward(policy, router.forward(policy, x, mask, k), d_scores, x, mask, d_x, gradients);
    R::each_parameter(detail::VisitNothing(), std::string(), parameters, gradients);
};

}  // namespace colt5
