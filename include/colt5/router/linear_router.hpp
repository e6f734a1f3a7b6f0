// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>
#include <string>
#include <string_view>

#include <colt5/op/clean_padding.hpp>
#include <colt5/op/gradient_epilogue.hpp>
#include <colt5/op/route_logits.hpp>
#include <colt5/router/router.hpp>

namespace colt5 {

/// What routers have in common whose logits are linear in the tokens:  s = logit_scale · x · routing_token
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
                  TokensView<const Scalar> x, Mask mask, TokensView<Scalar> d_x, Gradients& gradients) const {
        const auto& self = static_cast<const Self&>(*this);
        expect_parameters();
        expect_shape("gradients.routing_token", gradients.routing_token.shape(), routing_token.shape());
        expect_shape("x", x.shape(), {saved.routing.indices.extent(0), dynamic, config.dim});
        expect_shape("d_x", d_x.shape(), x.shape());
        expect_shape("d_scores", d_scores.shape(), saved.routing.indices.shape());
        const auto d_logits = self.d_logits(policy, saved, d_scores, mask);
        const auto copy = clean_copy(policy, x, mask);
        const auto clean = copy ? copy.const_view() : x;
        if constexpr (Self::cosine_sim_routing)
            cosine_logits_vjp(policy, d_x, gradients.routing_token.view(), d_logits, saved.logits, saved.norms, clean,
                              routing_token, Self::logit_scale);
        else
            route_logits_vjp(policy, d_x, gradients.routing_token.view(), d_logits, clean, routing_token,
                             Self::logit_scale);
    }

    /// Throws ShapeError, which calls it `prefix` + its name, when a parameter does not fit the configuration.
    void expect_parameters(std::string_view prefix = "") const {
        expect_shape(prefix, "routing_token", routing_token.shape(), {config.num_routing_tokens, config.dim});
    }

    template <typename F, typename... R>
    static void each_parameter(F&& f, const std::string& prefix, R&... routers) {
        f(prefix + "routing_token", routers.routing_token...);
    }

protected:
    auto logits(const P& policy, TokensView<const Scalar> x, Mask mask) const {  // (b, r, n)
        return similarity(policy, x, mask).logits;
    }
    /// The logits (b, r, n), and with cosine_sim_routing the norms (b, n) that backward reads.
    CosineLogits<Logit, P> similarity(const P& policy, TokensView<const Scalar> x, Mask mask) const {
        expect_parameters();
        expect_shape("x", x.shape(), {dynamic, dynamic, config.dim});
        const auto copy = clean_copy(policy, x, mask);
        const auto clean = copy ? copy.const_view() : x;
        if constexpr (Self::cosine_sim_routing)
            return cosine_logits(policy, clean, routing_token, Self::logit_scale);
        else
            return {route_logits(policy, clean, routing_token, Self::logit_scale), {}};
    }

private:
    /// Where masked tokens take part: of a policy that cleans padding as it reads, the clean tokens; otherwise nothing.
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

template <typename R>
concept IsLinearRouter = requires(const R& router) {
    detail::derives_from_linear_router(router);
};

namespace detail {
/// Whether the gradient that a router adds to the tokens is one rank-one update for each routing token.
template <typename R>
concept AddsRankOneUpdates = IsLinearRouter<R> && !R::cosine_sim_routing;
}  // namespace detail

/// The number of routing tokens of some routers of the same tokens, if the backend adds the gradients of all their
/// logits as rank-one updates in the epilogue of a light branch; otherwise 0, and each router's gradient is a pass over
/// the tokens of its own.
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
