// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/module/layers.hpp>
#include <colt5/module/parts.hpp>
#include <colt5/op/gelu.hpp>

namespace colt5 {

/// RMSNorm → Linear → GELU → Linear over the last axis: the light and the heavy feedforward.
///
/// Works on parts of the batch (see MemoryPlan).
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

    template <Viewable X>
    TokensTensor<Scalar, P> operator()(const P& policy, const X& x) const {
        auto out = tensor_like(policy, x);
        forward(policy, out.view(), x, false);
        return out;
    }

    /// The result goes to out (b, n, d).
    template <Viewable X>
    Pass forward(const P& policy, TokensView<Scalar> out, const X& x, bool keep) const {
        Pass pass;
        if (keep) pass.before = {policy, {x.extent(0), x.extent(1), hidden.weight.extent(0)}};
        const Parts parts(policy.memory_plan(), x.extent(0), x.extent(1));
        for (Index i = 0; i < parts.count(); ++i) {
            const Part part = parts[i];
            TokensTensor<Scalar, P> h;
            if (keep) {
                hidden(policy, part.of(pass.before), norm(policy, part.of(x)));
                h = gelu_forward(policy, part.of(pass.before));
            } else {
                h = hidden(policy, norm(policy, part.of(x)));  // (b, n, hidden)
                assign(policy, h, gelu(h));
            }
            project(policy, part.of(out), h);  // (b, n, d)
        }
        return pass;
    }

    /// The gradient goes to d_x (b, n, d).
    template <Viewable D, Viewable X>
    void backward(const P& policy, const Pass& pass, TokensView<Scalar> d_x, const D& d_out, const X& x,
                  Gradients& gradients) const {
        const Parts parts(policy.memory_plan(), x.extent(0), x.extent(1));
        for (Index i = 0; i < parts.count(); ++i) {
            const Part part = parts[i];
            auto normed = norm(policy, part.of(x));
            TokensTensor<Scalar, P> again;
            if (!pass.before) again = hidden(policy, normed);
            const auto before = pass.before ? part.of(pass.before) : again.const_view();  // (b, n, hidden)
            auto d_h = project.backward(policy, part.of(d_out), gelu_forward(policy, before), gradients.project);
            gelu_vjp(policy, d_h, before);  // (b, n, hidden)
            again = {};                     // what is not read any more gives its memory to what follows
            const auto d_normed = hidden.backward(policy, d_h, std::move(normed), gradients.hidden);  // (b, n, d)
            norm.backward(policy, part.of(d_x), d_normed, part.of(x), gradients.norm);
        }
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        RMSNorm<Scalar, P>::each_parameter(f, prefix + "0.", m.norm...);
        Linear<Scalar, P>::each_parameter(f, prefix + "1.", m.hidden...);
        Linear<Scalar, P>::each_parameter(f, prefix + "3.", m.project...);
    }
};

}  // namespace colt5
