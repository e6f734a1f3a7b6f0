// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/module/layers.hpp>
#include <colt5/op/gelu.hpp>

namespace colt5 {

/// RMSNorm → Linear → GELU → Linear over the last axis: the light and the heavy feedforward.
template <typename Scalar, Policy P>
struct FeedForward {
    RMSNorm<Scalar, P> norm;    // 0
    Linear<Scalar, P> hidden;   // 1: d → hidden
    Linear<Scalar, P> project;  // 3: hidden → d

    struct Gradients {
        RMSNorm<accumulate_t<Scalar>, P> norm;
        Linear<accumulate_t<Scalar>, P> hidden, project;
    };
    struct Pass {
        TokensTensor<Scalar, P> out;     // (b, n, d)
        TokensTensor<Scalar, P> before;  // (b, n, hidden): what GELU is applied to
    };

    FeedForward(const P& policy, SeedSequence& seeds, Index dim, Index dim_hidden)
        : norm(policy, dim),
          hidden(policy, seeds, dim, dim_hidden, true),
          project(policy, seeds, dim_hidden, dim, true) {}

    template <Viewable X>
    TokensTensor<Scalar, P> operator()(const P& policy, const X& x) const {
        auto h = hidden(policy, norm(policy, x));  // (b, n, hidden)
        assign(policy, h, gelu(h));
        return project(policy, h);  // (b, n, d)
    }

    template <Viewable X>
    Pass forward(const P& policy, const X& x) const {
        auto before = hidden(policy, norm(policy, x));             // (b, n, hidden)
        auto out = project(policy, gelu_forward(policy, before));  // (b, n, d)
        return {std::move(out), std::move(before)};
    }

    template <Viewable D, Viewable X>
    TokensTensor<Scalar, P> backward(const P& policy, const Pass& pass, const D& d_out, const X& x,
                                     Gradients& gradients) const {
        auto d_h = project.backward(policy, d_out, gelu_forward(policy, pass.before), gradients.project);
        gelu_vjp(policy, d_h, pass.before);                                                     // (b, n, hidden)
        const auto d_normed = hidden.backward(policy, d_h, norm(policy, x), gradients.hidden);  // (b, n, d)
        return norm.backward(policy, d_normed, x, gradients.norm);
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        RMSNorm<Scalar, P>::each_parameter(f, prefix + "0.", m.norm...);
        Linear<Scalar, P>::each_parameter(f, prefix + "1.", m.hidden...);
        Linear<Scalar, P>::each_parameter(f, prefix + "3.", m.project...);
    }
};

}  // namespace colt5
