// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

#include <colt5/core/parameters.hpp>
#include <colt5/core/random.hpp>
#include <colt5/op/clean_padding.hpp>
#include <colt5/op/coordinate_descent.hpp>
#include <colt5/op/gather.hpp>
#include <colt5/op/gradient_epilogue.hpp>
#include <colt5/op/route_logits.hpp>
#include <colt5/op/sinkhorn.hpp>

/// In these comments, the reference is the PyTorch package colt5-attention, and a real token is one that is not masked.
namespace colt5 {

/// Settings of CoordinateDescentRouter.
struct CoordinateDescentKwargs {
    int n_iters = 50;
    /// The k of the descent is the number of heavy tokens times this, "for better learning" as the reference says.
    double fetch_k_ratio = 9.0 / 8;
    double eps = 1;
    double eps_init = 0;   ///< first ε of ε-scaling; 0: none
    double eps_decay = 1;  ///< the next step's ε is max(ε · eps_decay, eps)
    DescentStart start = DescentStart::zero;
    /// Multiplies the logits. At the reference's initialization their standard deviation is about √dim. Then the
    /// descent saturates (chosen tokens score 1), and the router has no gradient. For training set it to 1/√dim.
    double score_scale = 1;
    /// Solves for the threshold instead of making n_iters steps; see CoordinateDescent. Set this for training, too.
    /// Scores of tokens above the threshold have no gradient. With a fetch_k_ratio above 1, all chosen tokens lie above
    /// it once the logits spread widely, and the router gets no gradient. With a fetch_k_ratio of 1, at least the
    /// chosen token with the smallest logit is not above it, and has a gradient.
    bool iterate_to_convergence = false;
    bool cosine_sim_routing = false;  ///< logits are cosines of the angle to the routing token; see cosine_logits
    double cosine_sim_scale = 8;      ///< multiplies the cosines
    /// A sequence with at most k real tokens, where k is the number of heavy tokens, is not routed, as in
    /// colt5-attention 0.11: its real tokens all score 1, and the router gets no gradient from them.
    bool short_rows_score_one = false;
    /// Masked tokens count as real ones, as in the reference, in two places: in the upper bound of the descent's k (not
    /// with iterate_to_convergence, where that stays the number of real tokens), and in the "at most k tokens" of
    /// short_rows_score_one.
    bool masked_tokens_count = false;

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
    /// A sequence with at most k real tokens, where k is the number of heavy tokens, is not routed, as in
    /// colt5-attention 0.11: its real tokens all score 1, and the router gets no gradient from them.
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

/// Settings of CausalRouter; see CausalTopK.
struct CausalKwargs {
    double rate = 1.0 / 16;      ///< routed tokens per token
    double burst = 0;            ///< tokens that may be routed beyond that; 0: max(1, 2 · rate · block_size)
    Index block_size = 256;      ///< a block of tokens is compared with as many before it; a power of two up to 1024
    double fetch_k_ratio = 1.0;  ///< multiplies the k of the descent
    double eps = 1;
    double score_scale = 1;           ///< multiplies the logits; see CoordinateDescentKwargs
    bool cosine_sim_routing = false;  ///< logits are cosines of the angle to the routing token; see cosine_logits
    double cosine_sim_scale = 8;      ///< multiplies the cosines
};

/// The reference's router_kwargs, for each of its routers and for ours; a router reads its own.
struct RouterKwargs {
    Index route_block_size = 0;  ///< routes in blocks of so many tokens, see BlockRouter; 0: the sequence as a whole
    CoordinateDescentKwargs coor_descent{};
    CumulativeSoftmaxKwargs cum_softmax{};
    SinkhornKwargs sinkhorn{};
    CausalKwargs causal{};
};

/// The reference's router_type, and `causal`, which is ours.
enum class RouterType { coor_descent, cum_softmax, sinkhorn, causal };

/// What a module tells its router at compile time.
struct RouterConfig {
    Index dim;
    Index num_routing_tokens = 1;
    bool straight_through = true;
    RouterType router_type = RouterType::coor_descent;  ///< read by ConfiguredRouter only
    RouterKwargs kwargs{};
};

/// Which tokens go to the heavy branch, and what their output is multiplied by. A row is one route of one sample; each
/// of its k entries, an index and a score, is a pick.
template <typename Logit, Policy P>
struct Routing {
    Tensor<TokenIndex, P, dynamic, dynamic, dynamic> indices;  // (b, r, k)
    Tensor<Logit, P, dynamic, dynamic, dynamic> scores;        // (b, r, k); 0 for masked tokens
};

/// What forward of a router returns: `.routing`, and what its backward reads.
template <typename R, typename Scalar, typename P>
using RouterActivations =
    decltype(std::declval<const R&>().forward(std::declval<const P&>(), TokensView<const Scalar>(), Mask(), Index()));

/// The result of a router's `route` in a struct with `.routing`, as `forward` returns one.
template <typename Logit, Policy P>
struct Evaluated {
    Routing<Logit, P> routing;
};

/// Calls `forward` of a router if backward is to follow, otherwise `route`. Either result has `.routing`. x (b, n, d);
/// a LinearRouter also takes routing tokens (b, r, d).
template <bool save, typename R, typename Scalar, Policy P, typename... RoutingTokens>
auto run_router(const R& router, const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens,
                const RoutingTokens&... routing_tokens) {
    if constexpr (save)
        return router.forward(policy, x, mask, num_tokens, routing_tokens...);
    else
        return Evaluated<accumulate_t<Scalar>, P>{router.route(policy, x, mask, num_tokens, routing_tokens...)};
}

/// A router of one routing token gives (b, 1, k): seen as (b, k).
template <typename T>
auto single_route(const T& tensor) {
    expect_shape("routing", tensor.shape(), {dynamic, 1, dynamic});
    return tensor.const_view().reshape(std::array<Index, 2>{tensor.extent(0), tensor.extent(2)});
}

/// The picks of all routes, seen as those of one: (b, r, k) as (b, r · k)
template <typename T>
auto all_routes(const T& tensor) {
    return tensor.const_view().reshape(std::array<Index, 2>{tensor.extent(0), tensor.extent(1) * tensor.extent(2)});
}

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
///     R::each_parameter(f, prefix, r...)     r... are routers R or R::Gradients; calls f(prefix + name, tensor...) for
///                                            each parameter, with that parameter's tensor of every r. A router with a
///                                            state also calls f.state, if f has it (see StateVisitor)
///
/// A router that may choose fewer than k tokens of a long sequence has a constant R::has_unused_picks = true: the rest
/// of its indices are any other tokens, with score 0. It goes with heavy branches that map each token alone. Attention
/// takes it if its constant R::is_causal is true, too: a token's choice and score depend on no later token, the chosen
/// ones are the first picks, in the order of the sequence, and forward also gives `.live` (b, r, k), true for them.
///
/// Indices are distinct within a row unless picks_repeat. With straight_through the score of a chosen real token is
/// exactly 1 (NaN if a logit of its row is NaN), and backward uses the gradient of the score that the token would have
/// without straight_through. Logits are float or double whatever x is: accumulate_t<Scalar>.
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

/// What routers have in common whose logits are linear in the tokens:  s = logit_scale · x · routing_token
///
/// Routing tokens may also be given to a call, one set for each sample (b, r, d): then routing_token is not read and
/// gets no gradient, theirs is added to `d_routing_tokens`.
///
/// With cosine_sim_routing x and the routing token are normalized before, see cosine_logits. Then the Activations have
/// `logits` and `norms`, those of `similarity`, too.
///
/// A Self that derives from it has `route` and `forward` of its own, and instead of `backward`
///
///     self.d_logits(policy, saved, d_scores, mask)     d_scores (b, r, k)  →  the gradient of the logits (b, r, n)
template <typename Self, RouterConfig config, typename Scalar, typename P>
class LinearRouter {
    static_assert(config.dim >= 1, "colt5: RouterConfig.dim must be at least 1");
    static_assert(config.num_routing_tokens >= 1, "colt5: RouterConfig.num_routing_tokens must be at least 1");

public:
    using Logit = accumulate_t<Scalar>;
    static constexpr Index num_routing_tokens = config.num_routing_tokens;
    static constexpr double logit_scale = 1;
    static constexpr bool cosine_sim_routing = false;
    static constexpr bool masked_tokens_take_part = false;  // whether their logits are read

    struct Gradients {
        MatrixTensor<Logit, P> routing_token;  // (r, d)
    };

    MatrixTensor<Scalar, P> routing_token;  // (r, d)

    LinearRouter(const P& policy, SeedSequence& seeds)
        : routing_token(policy, {config.num_routing_tokens, config.dim}) {
        fill_normal(policy, routing_token, seeds.next());
    }

    template <typename Activations>
    void backward(const P& policy, const Activations& saved, TokensView<const Logit> d_scores,
                  TokensView<const Scalar> x, Mask mask, TokensView<Scalar> d_x, Gradients& gradients,
                  TokensView<const Scalar> routing_tokens = {}, TokensView<Logit> d_routing_tokens = {}) const {
        const auto& self = static_cast<const Self&>(*this);
        expect_parameters();
        expect_shape("gradients.routing_token", gradients.routing_token.shape(), routing_token.shape());
        expect_shape("x", x.shape(), {saved.routing.indices.extent(0), dynamic, config.dim});
        expect_shape("d_x", d_x.shape(), x.shape());
        expect_shape("d_scores", d_scores.shape(), saved.routing.indices.shape());
        const auto d_logits = self.d_logits(policy, saved, d_scores, mask);
        const auto copy = clean_copy(policy, x, mask);
        const auto clean = copy ? copy.const_view() : x;
        const auto add = [&](const auto& tokens, auto d_tokens) {
            if constexpr (Self::cosine_sim_routing)
                cosine_logits_vjp(policy, d_x, d_tokens, d_logits, saved.logits, saved.norms, clean, tokens,
                                  Self::logit_scale);
            else
                route_logits_vjp(policy, d_x, d_tokens, d_logits, clean, tokens, Self::logit_scale);
        };
        if (routing_tokens)
            add(routing_tokens, d_routing_tokens);
        else
            add(routing_token, gradients.routing_token.view());
    }

    /// Throws ShapeError when a parameter does not fit the configuration. The message names the parameter, with
    /// `prefix` before its name.
    void expect_parameters(std::string_view prefix = "") const {
        expect_shape(prefix, "routing_token", routing_token.shape(), {config.num_routing_tokens, config.dim});
    }

    template <typename F, typename... R>
    static void each_parameter(F&& f, const std::string& prefix, R&... routers) {
        f(name_for<F>(prefix, "routing_token"), routers.routing_token...);
    }

protected:
    auto logits(const P& policy, TokensView<const Scalar> x, Mask mask,
                TokensView<const Scalar> routing_tokens) const {  // (b, r, n)
        return similarity(policy, x, mask, routing_tokens).logits;
    }
    /// The logits (b, r, n), and with cosine_sim_routing the norms (b, n) that backward reads.
    CosineLogits<Logit, P> similarity(const P& policy, TokensView<const Scalar> x, Mask mask,
                                      TokensView<const Scalar> routing_tokens) const {
        expect_parameters();
        expect_shape("x", x.shape(), {dynamic, dynamic, config.dim});
        if (routing_tokens)
            expect_shape("routing_tokens", routing_tokens.shape(),
                         {x.extent(0), config.num_routing_tokens, config.dim});
        const auto copy = clean_copy(policy, x, mask);
        const auto clean = copy ? copy.const_view() : x;
        return routing_tokens ? similarity_to(policy, clean, routing_tokens)
                              : similarity_to(policy, clean, routing_token);
    }

private:
    template <typename Tokens>
    static CosineLogits<Logit, P> similarity_to(const P& policy, TokensView<const Scalar> x, const Tokens& tokens) {
        if constexpr (Self::cosine_sim_routing)
            return cosine_logits(policy, x, tokens, Self::logit_scale);
        else
            return {route_logits(policy, x, tokens, Self::logit_scale), {}};
    }

    /// A copy of x with clean padding, if the router reads masked tokens and the policy leaves the cleaning to kernels
    /// (cleans_as_it_reads); otherwise empty.
    static TokensTensor<Scalar, P> clean_copy([[maybe_unused]] const P& policy,
                                              [[maybe_unused]] TokensView<const Scalar> x, [[maybe_unused]] Mask mask) {
        if constexpr (cleans_as_it_reads<P> && Self::masked_tokens_take_part)
            if (mask) return copy_with_clean_padding(policy, x, mask);
        return {};
    }
};

namespace detail {
template <typename Self, RouterConfig config, typename Scalar, typename P>
void derives_from_linear_router(const LinearRouter<Self, config, Scalar, P>&);
}  // namespace detail

/// Whether picks of a router with score 0 may be real tokens that it has not chosen.
template <typename R>
inline constexpr bool has_unused_picks = [] {
    if constexpr (requires { R::has_unused_picks; })
        return R::has_unused_picks;
    else
        return false;
}();

/// Whether a router is causal, see Router.
template <typename R>
inline constexpr bool is_causal_router = [] {
    if constexpr (requires { R::is_causal; })
        return R::is_causal;
    else
        return false;
}();

/// A router that can route a sequence a few tokens at a time. R::State is what it has to know of earlier tokens:
/// router.make_state(policy, batch, num_tokens) makes that of sequences without a token, and
/// router.route_next(policy, state, x, mask, num_tokens) returns the NextCausalPicks of the next tokens x.
template <typename R>
concept RoutesNext = requires {
    typename R::State;
};

namespace detail {
struct NoRouterState {};
template <typename R>
struct StateOfRouter {
    using type = NoRouterState;
};
template <RoutesNext R>
struct StateOfRouter<R> {
    using type = typename R::State;
};
}  // namespace detail

/// R::State of a router that meets RoutesNext; an empty struct for any other router.
template <typename R>
using RouterState = typename detail::StateOfRouter<R>::type;

template <typename R>
concept IsLinearRouter = requires(const R& router) {
    detail::derives_from_linear_router(router);
};

namespace detail {
/// Whether the gradient that a router adds to the tokens is one rank-one update for each routing token.
template <typename R>
concept AddsRankOneUpdates = IsLinearRouter<R> && !R::cosine_sim_routing;
}  // namespace detail

/// The number of routing tokens of all Routers together, which route the same tokens, if the backend can add the
/// gradients of their logits as rank-one updates in the epilogue of a light branch. Otherwise 0, and each router adds
/// its gradient in a separate pass over the tokens.
template <typename P, typename... Routers>
inline constexpr std::size_t rank_one_updates = [] {
    if constexpr ((detail::AddsRankOneUpdates<Routers> && ...)) {
        constexpr auto all = static_cast<std::size_t>((Routers::num_routing_tokens + ...));
        return all <= max_rank_one_updates<P> ? all : 0;
    } else {
        return std::size_t{0};
    }
}();

/// The updates of one router, from place `at` on: d_logits (b, r, n). The caller has compared the shapes of parameters
/// and gradients.
template <typename T, Policy P, std::size_t updates, typename R>
void set_rank_one_updates(GradientEpilogue<T, P, updates>& epilogue, std::size_t at, const R& router,
                          TokensView<const accumulate_t<T>> d_logits, typename R::Gradients& gradients) {
    for (Index r = 0; r < R::num_routing_tokens; ++r)
        epilogue.rank_one[at++] = {d_logits, r, router.routing_token.const_view()[r], gradients.routing_token.view()[r],
                                   R::logit_scale};
}

}  // namespace colt5
