// SPDX-License-Identifier: MIT
#pragma once

#include <string_view>
#include <type_traits>

#include <colt5/module/layers.hpp>
#include <colt5/module/parts.hpp>
#include <colt5/op/feed_forward.hpp>

namespace colt5 {

/// RMSNorm → Linear → GELU → Linear over the last axis: the light and the heavy feedforward.
///
/// Works on parts of the batch (see MemoryPlan). A policy that cleans padding as it reads takes the mask to do so.
template <typename Scalar, Policy P>
struct FeedForward {
    RMSNorm<Scalar, P> norm;    // 0
    Linear<Scalar, P> hidden;   // 1: d → hidden
    Linear<Scalar, P> project;  // 3: hidden → d

    struct Gradients {
        RMSNorm<accumulate_t<Scalar>, P> norm;
        Linear<accumulate_t<Scalar>, P> hidden, project;
    };
    /// What backward does not compute again.
    struct Pass {
        TokensTensor<Scalar, P> before;  // (b, n, hidden): what GELU is applied to; or nothing
    };

    FeedForward(const P& policy, SeedSequence& seeds, Index dim, Index dim_hidden)
        : norm(policy, dim),
          hidden(policy, seeds, dim, dim_hidden, true),
          project(policy, seeds, dim_hidden, dim, true) {}

    /// Throws ShapeError, which calls it `prefix` + its name, when a parameter does not fit tokens of `dim` numbers.
    void expect_parameters(std::string_view prefix, Index dim) const {
        const Index width = hidden.weight.extent(0);
        expect_shape(prefix, "norm.gamma", norm.gamma.shape(), {dim});
        expect_shape(prefix, "hidden.weight", hidden.weight.shape(), {width, dim});
        expect_shape(prefix, "hidden.bias", hidden.bias.shape(), {width});
        expect_shape(prefix, "project.weight", project.weight.shape(), {dim, width});
        expect_shape(prefix, "project.bias", project.bias.shape(), {dim});
    }

    template <Viewable X>
    TokensTensor<Scalar, P> operator()(const P& policy, const X& x) const {
        auto out = tensor_like(policy, x);
        forward(policy, out.view(), x, false);
        return out;
    }

    /// The result goes to out (b, n, d); `add` (b, n, d), such as a residual, is added to it if there is one.
    template <Viewable X>
    Pass forward(const P& policy, TokensView<Scalar> out, const X& x, bool keep, TokensView<const Scalar> add = {},
                 Mask clean_mask = {}) const {
        expect_parameters("", x.extent(2));
        expect_shape("out", out.shape(), x.shape());
        if (add) expect_shape("add", add.shape(), x.shape());
        Pass pass;
        if (keep) pass.before = {policy, {x.extent(0), x.extent(1), hidden.weight.extent(0)}};
        const Parts parts(policy.memory_plan(), x.extent(0), x.extent(1));
        for (Index i = 0; i < parts.count(); ++i) {
            const Part part = parts[i];
            feed_forward(policy, part.of(out), part.of(x), parameters(*this, part.of(clean_mask)), part.of(pass.before),
                         part.of(add));
        }
        return pass;
    }

    /// The gradient goes to d_x (b, n, d), and what else is to.
    template <Viewable D, Viewable X, std::size_t routes = 0>
    void backward(const P& policy, const Pass& pass, TokensView<Scalar> d_x, const D& d_out, const X& x,
                  Gradients& gradients, const SharedGradient<Scalar, P, routes>& shared = {},
                  Mask clean_mask = {}) const {
        expect_parameters("", x.extent(2));
        expect_like<FeedForward>("gradients", *this, gradients);
        if (pass.before)
            expect_shape("pass.before", pass.before.shape(), {x.extent(0), x.extent(1), hidden.weight.extent(0)});
        expect_shape("d_x", d_x.shape(), x.shape());
        expect_shape("d_out", d_out.shape(), x.shape());
        detail::check_shared_gradient(shared, x);
        const Parts parts(policy.memory_plan(), x.extent(0), x.extent(1));
        for (Index i = 0; i < parts.count(); ++i) {
            const Part part = parts[i];
            feed_forward_vjp(policy, part.of(d_x), part.of(d_out), part.of(x), part.of(pass.before.const_view()),
                             parameters(*this, part.of(clean_mask)), parameters(gradients), part.of(shared));
        }
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        constexpr bool members = NamesMembers<F>;
        RMSNorm<Scalar, P>::each_parameter(f, prefix + (members ? "norm." : "0."), m.norm...);
        Linear<Scalar, P>::each_parameter(f, prefix + (members ? "hidden." : "1."), m.hidden...);
        Linear<Scalar, P>::each_parameter(f, prefix + (members ? "project." : "3."), m.project...);
    }

private:
    /// Of the module or of its gradients.
    template <typename M>
    static auto parameters(M& m, Mask clean_mask = {}) {
        using T = std::remove_pointer_t<decltype(m.hidden.weight.data())>;
        return FeedForwardParameters<T>{m.norm.parameters(clean_mask), m.hidden.weight.view(), m.hidden.bias.view(),
                                        m.project.weight.view(), m.project.bias.view()};
    }
};

}  // namespace colt5
