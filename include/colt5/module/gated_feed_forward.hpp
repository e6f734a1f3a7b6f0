// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <utility>

#include <colt5/module/layers.hpp>
#include <colt5/op/norm_linear.hpp>
#include <colt5/schedule/chunks.hpp>

namespace colt5 {

/// The feedforward of T5 1.1, which CoLT5 uses, over the last axis; no biases:
///
///     n = RMSNorm(x),   h = gelu_tanh(n · wi_0ᵀ) ∘ (n · wi_1ᵀ),   out = h · woᵀ
///
/// GELU in its tanh form, as T5's code has it; FeedForward has that of the package, with erf. The weights have T5's
/// names. They are drawn as those of torch.nn.Linear; the norm is that of RMSNorm, which adds no ε to the squares.
///
/// Works chunk by chunk (see Chunks). A policy that cleans padding as it reads takes the mask to do so.
template <typename Scalar, Policy P>
struct GatedFeedForward {
    RMSNorm<Scalar, P> norm;
    Linear<Scalar, P> wi_0, wi_1;  // d → hidden
    Linear<Scalar, P> wo;          // hidden → d

    struct Gradients {
        RMSNorm<accumulate_t<Scalar>, P> norm;
        Linear<accumulate_t<Scalar>, P> wi_0, wi_1, wo;
    };
    /// What backward does not recompute.
    struct Activations {
        TokensTensor<Scalar, P> gate, gated;  // (b, n, hidden): n · wi_0ᵀ and n · wi_1ᵀ; or nothing
    };

    GatedFeedForward(const P& policy, SeedSequence& seeds, Index dim, Index dim_hidden)
        : norm(policy, dim),
          wi_0(policy, seeds, dim, dim_hidden, false),
          wi_1(policy, seeds, dim, dim_hidden, false),
          wo(policy, seeds, dim_hidden, dim, false) {}

    /// Throws ShapeError when a parameter does not fit tokens of `dim` numbers. The message names the parameter, with
    /// `prefix` before its name.
    void expect_parameters(std::string_view prefix, Index dim) const {
        const Index width = wi_0.weight.extent(0);
        expect_shape(prefix, "norm.gamma", norm.gamma.shape(), {dim});
        expect_shape(prefix, "wi_0.weight", wi_0.weight.shape(), {width, dim});
        expect_shape(prefix, "wi_1.weight", wi_1.weight.shape(), {width, dim});
        expect_shape(prefix, "wo.weight", wo.weight.shape(), {dim, width});
    }

    template <Viewable X>
    TokensTensor<Scalar, P> operator()(const P& policy, const X& x) const {
        auto out = tensor_like(policy, x);
        forward(policy, out.view(), x, false);
        return out;
    }

    /// The result goes to out (b, n, d); `residual` (b, n, d) is added to it if there is one. Saves the projections
    /// for backward if `save` says so.
    template <Viewable X>
    Activations forward(const P& policy, TokensView<Scalar> out, const X& x, bool save,
                        TokensView<const Scalar> residual = {}, Mask clean_mask = {}) const {
        expect_parameters("", x.extent(2));
        expect_shape("out", out.shape(), x.shape());
        if (residual) expect_shape("residual", residual.shape(), x.shape());
        Activations saved;
        if (save) {
            saved.gate = {policy, {x.extent(0), x.extent(1), wi_0.weight.extent(0)}};
            saved.gated = tensor_like(policy, saved.gate);
        }
        in_chunks(policy, x, [&](const Chunk& chunk) {
            auto h = hidden_like(policy, chunk);  // (b, n, hidden)
            TokensTensor<Scalar, P> own_gated;
            if (!save) own_gated = hidden_like(policy, chunk);
            const auto gate = save ? chunk.of(saved.gate) : h.view();
            const auto gated = save ? chunk.of(saved.gated) : own_gated.view();
            norm_linear(policy, chunk.of(x), norm_of(chunk, clean_mask),
                        std::array{Projection<Scalar>{gate, wi_0.weight}, Projection<Scalar>{gated, wi_1.weight}});
            assign(policy, h, gelu_tanh(gate) * gated);
            wo(policy, chunk.of(out), h, chunk.of(residual));  // (b, n, d)
        });
        return saved;
    }

    /// Writes to d_x (b, n, d) the gradient of x plus the terms of `epilogue`, which the norm's vector-Jacobian product
    /// adds. Adds the gradients of the parameters to `gradients`. With s the gradient of h:
    ///
    ///     d_gate = s ∘ gated ∘ gelu_tanh'(gate),   d_gated = s ∘ gelu_tanh(gate)
    ///     d_n = d_gate · wi_0 + d_gated · wi_1
    template <Viewable D, Viewable X, std::size_t updates = 0>
    void backward(const P& policy, const Activations& saved, TokensView<Scalar> d_x, const D& d_out, const X& x,
                  Gradients& gradients, const GradientEpilogue<Scalar, P, updates>& epilogue = {},
                  Mask clean_mask = {}) const {
        expect_parameters("", x.extent(2));
        expect_like<GatedFeedForward>("gradients", *this, gradients);
        const std::array hidden_shape{x.extent(0), x.extent(1), wi_0.weight.extent(0)};
        const bool is_saved = static_cast<bool>(saved.gate);
        if (is_saved) {
            expect_shape("saved.gate", saved.gate.shape(), hidden_shape);
            expect_shape("saved.gated", saved.gated.shape(), hidden_shape);
        }
        expect_shape("d_x", d_x.shape(), x.shape());
        expect_shape("d_out", d_out.shape(), x.shape());
        detail::check_epilogue(epilogue, x);
        in_chunks(policy, x, [&](const Chunk& chunk) {
            const auto of_x = chunk.of(x);
            const auto of_norm = norm_of(chunk, clean_mask);
            auto normed = normalize(policy, of_x, of_norm);  // (b, n, d)
            TokensTensor<Scalar, P> own_gate, own_gated;
            if (!is_saved) {
                own_gate = wi_0(policy, normed);   // (b, n, hidden)
                own_gated = wi_1(policy, normed);  // (b, n, hidden)
            }
            const auto gate = is_saved ? chunk.of(saved.gate) : own_gate.const_view();
            const auto gated = is_saved ? chunk.of(saved.gated) : own_gated.const_view();
            auto h = hidden_like(policy, chunk), d_gate = hidden_like(policy, chunk);
            assign(policy, h, gelu_tanh(gate) * gated);
            auto d_h = wo.backward(policy, chunk.of(d_out), std::move(h), gradients.wo);  // (b, n, hidden)
            assign(policy, d_gate, d_h * gated * gelu_tanh_slope(gate));
            assign(policy, d_h, d_h * gelu_tanh(gate));                             // now of `gated`
            auto d_normed = wi_0.backward(policy, d_gate, normed, gradients.wi_0);  // (b, n, d)
            assign(policy, d_normed, d_normed + wi_1.backward(policy, d_h, std::move(normed), gradients.wi_1));
            normalize_vjp(policy, chunk.of(d_x), d_normed, of_x, of_norm,
                          RMSNormParameters<accumulate_t<Scalar>>{gradients.norm.gamma.view()}, chunk.of(epilogue));
        });
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        RMSNorm<Scalar, P>::each_parameter(f, name_for<F>(prefix, "norm."), m.norm...);
        Linear<Scalar, P>::each_parameter(f, name_for<F>(prefix, "wi_0."), m.wi_0...);
        Linear<Scalar, P>::each_parameter(f, name_for<F>(prefix, "wi_1."), m.wi_1...);
        Linear<Scalar, P>::each_parameter(f, name_for<F>(prefix, "wo."), m.wo...);
    }

private:
    /// (b, n, hidden) for the tokens of a chunk.
    TokensTensor<Scalar, P> hidden_like(const P& policy, const Chunk& chunk) const {
        return {policy, {chunk.sequences, chunk.tokens, wi_0.weight.extent(0)}};
    }
    auto norm_of(const Chunk& chunk, Mask clean_mask) const {
        return RMSNormParameters<const Scalar>{norm.gamma.const_view(), chunk.of(clean_mask)};
    }
};

/// A gated feedforward whose sizes belong to its type.
template <Index dim, Index dim_hidden, typename Scalar, Policy P>
struct SizedGatedFeedForward : GatedFeedForward<Scalar, P> {
    SizedGatedFeedForward(const P& policy, SeedSequence& seeds)
        : GatedFeedForward<Scalar, P>(policy, seeds, dim, dim_hidden) {}
};

}  // namespace colt5
