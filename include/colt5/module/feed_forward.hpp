// SPDX-License-Identifier: MIT
#pragma once

#include <string_view>
#include <type_traits>

#include <colt5/module/layers.hpp>
#include <colt5/op/feed_forward.hpp>
#include <colt5/schedule/chunks.hpp>

namespace colt5 {

/// RMSNorm → Linear → GELU → Linear over the last axis: the light and the heavy feedforward.
///
/// Works chunk by chunk (see Chunks). All shapes are checked before the first chunk, and chunks go straight to the
/// kernels of op/feed_forward.hpp. A policy that cleans padding as it reads takes the mask to do so.
template <typename Scalar, Policy P>
struct FeedForward {
    // The numbers are the names of these parts in the PyTorch package, where the feedforward is an nn.Sequential.
    RMSNorm<Scalar, P> norm;    // 0
    Linear<Scalar, P> hidden;   // 1: d → hidden
    Linear<Scalar, P> project;  // 3: hidden → d

    struct Gradients {
        RMSNorm<accumulate_t<Scalar>, P> norm;
        Linear<accumulate_t<Scalar>, P> hidden, project;
    };
    /// What backward does not recompute.
    struct Activations {
        TokensTensor<Scalar, P> pre_activation;  // (b, n, hidden): what GELU is applied to; or nothing
    };

    FeedForward(const P& policy, SeedSequence& seeds, Index dim, Index dim_hidden)
        : norm(policy, dim),
          hidden(policy, seeds, dim, dim_hidden, true),
          project(policy, seeds, dim_hidden, dim, true) {}

    /// Throws ShapeError when a parameter does not fit tokens of `dim` numbers. The message names the parameter, with
    /// `prefix` before its name.
    void expect_parameters(std::string_view prefix, Index dim) const {
        const Index width = hidden.weight.extent(0);
        expect_shape(prefix, "norm.gamma", norm.gamma.shape(), {dim});
        expect_shape(prefix, "hidden.weight", hidden.weight.shape(), {width, dim});
        expect_shape(prefix, "hidden.bias", hidden.bias.shape(), {width});
        expect_shape(prefix, "project.weight", project.weight.shape(), {dim, width});
        expect_shape(prefix, "project.bias", project.bias.shape(), {dim});
    }

    TokensTensor<Scalar, P> operator()(const P& policy, TokensView<const Scalar> x) const {
        auto out = tensor_like(policy, x);
        forward(policy, out.view(), x, false);
        return out;
    }

    /// The result goes to out (b, n, d); `residual` (b, n, d) is added to it if there is one. Saves what GELU is
    /// applied to for backward if `save` says so.
    Activations forward(const P& policy, TokensView<Scalar> out, TokensView<const Scalar> x, bool save,
                        TokensView<const Scalar> residual = {}, Mask clean_mask = {}) const {
        expect_parameters("", x.extent(2));
        expect_shape("out", out.shape(), x.shape());
        if (residual) expect_shape("residual", residual.shape(), x.shape());
        Activations saved;
        if (save) saved.pre_activation = {policy, {x.extent(0), x.extent(1), hidden.weight.extent(0)}};
        in_chunks(policy, x, [&](const Chunk& chunk) {
            feed_forward_kernel(policy, chunk.of(out), chunk.of(saved.pre_activation), chunk.of(x),
                                parameters(*this, chunk.of(clean_mask)), chunk.of(residual));
        });
        return saved;
    }

    /// Writes to d_x (b, n, d) the gradient of x plus the terms of `epilogue`, which the norm's vector-Jacobian product
    /// adds. Adds the gradients of the parameters to `gradients`.
    template <std::size_t updates = 0>
    void backward(const P& policy, const Activations& saved, TokensView<Scalar> d_x, TokensView<const Scalar> d_out,
                  TokensView<const Scalar> x, Gradients& gradients,
                  const GradientEpilogue<Scalar, P, updates>& epilogue = {}, Mask clean_mask = {}) const {
        expect_parameters("", x.extent(2));
        expect_like<FeedForward>("gradients", *this, gradients);
        if (saved.pre_activation)
            expect_shape("saved.pre_activation", saved.pre_activation.shape(),
                         {x.extent(0), x.extent(1), hidden.weight.extent(0)});
        expect_shape("d_x", d_x.shape(), x.shape());
        expect_shape("d_out", d_out.shape(), x.shape());
        detail::check_epilogue(epilogue, x);
        in_chunks(policy, x, [&](const Chunk& chunk) {
            feed_forward_vjp_kernel(policy, chunk.of(d_x), parameters(gradients), chunk.of(d_out), chunk.of(x),
                                    chunk.of(saved.pre_activation.const_view()),
                                    parameters(*this, chunk.of(clean_mask)), chunk.of(epilogue));
        });
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        constexpr bool members = NamesMembers<F>;
        RMSNorm<Scalar, P>::each_parameter(f, name_for<F>(prefix, members ? "norm." : "0."), m.norm...);
        Linear<Scalar, P>::each_parameter(f, name_for<F>(prefix, members ? "hidden." : "1."), m.hidden...);
        Linear<Scalar, P>::each_parameter(f, name_for<F>(prefix, members ? "project." : "3."), m.project...);
    }

private:
    /// Of the module or of its gradients.
    template <typename M>
    static auto parameters(M& m, Mask clean_mask = {}) {
        using T = std::remove_pointer_t<decltype(m.hidden.weight.data())>;
        return FeedForwardParameters<T>{{m.norm.gamma.view(), clean_mask},
                                        m.hidden.weight.view(),
                                        m.hidden.bias.view(),
                                        m.project.weight.view(),
                                        m.project.bias.view()};
    }
};

/// A feedforward whose sizes belong to its type.
template <Index dim, Index dim_hidden, typename Scalar, Policy P>
struct SizedFeedForward : FeedForward<Scalar, P> {
    SizedFeedForward(const P& policy, SeedSequence& seeds) : FeedForward<Scalar, P>(policy, seeds, dim, dim_hidden) {}
};

}  // namespace colt5
