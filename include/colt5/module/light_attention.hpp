// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include <colt5/module/layers.hpp>
#include <colt5/schedule/light_attention.hpp>

namespace colt5 {

namespace detail {
/// The shapes of a module's `norm` of `dim` numbers.
template <typename Scalar, Policy P>
void expect_norm(std::string_view prefix, const LayerNorm<Scalar, P>& norm, Index dim) {
    expect_shape(prefix, "norm.weight", norm.weight.shape(), {dim});
    expect_shape(prefix, "norm.bias", norm.bias.shape(), {dim});
}
template <typename Scalar, Policy P>
void expect_norm(std::string_view prefix, const RMSNorm<Scalar, P>& norm, Index dim) {
    expect_shape(prefix, "norm.gamma", norm.gamma.shape(), {dim});
}
}  // namespace detail

/// The light branch of attention: every token sees the tokens around it (LocalMHA of the package local-attention).
///
/// LayerNorm → queries, keys and values → local attention → output projection; no biases in the projections. (Or
/// another norm of layers.hpp.) With `has_bias`, the logits get T5's relative position bias, with `rotary_emb`, queries
/// and keys are rotated by their tokens' positions. `head` is dim_head if it is a head_size of the policy.
template <typename Scalar, Policy P, bool has_bias = false, template <typename, Policy> class Norm = LayerNorm,
          Index head = dynamic>
struct LightAttention {
    using Schedule = LightAttentionSchedule<Scalar, P, has_bias, Norm<Scalar, P>::template Parameters, head>;
    using Activations = typename Schedule::Activations;

    Norm<Scalar, P> norm;
    Linear<Scalar, P> to_qkv, to_out;
    RelativeAttentionBias<Scalar, P> relative_attention_bias;  // empty unless has_bias
    VectorTensor<float, P> inv_freq;                           // (dim_head / 2), of the rotation, or empty
    Schedule schedule;

    struct Gradients {
        Norm<accumulate_t<Scalar>, P> norm;
        Linear<accumulate_t<Scalar>, P> to_qkv, to_out;
        RelativeAttentionBias<accumulate_t<Scalar>, P> relative_attention_bias;
    };

    LightAttention(const P& policy, SeedSequence& seeds, Index dim, Index heads, Index dim_head,
                   LocalAttention attention, const RelativePositionBuckets& buckets = {}, bool rotary_emb = false)
        : norm(policy, dim),
          to_qkv(policy, seeds, dim, 3 * detail::expect_heads(heads, dim_head), false),
          to_out(policy, seeds, heads * dim_head, dim, false),
          schedule{heads, dim_head, attention, buckets} {
        if constexpr (has_bias) relative_attention_bias = {policy, seeds, buckets, heads, dim};
        if (rotary_emb) inv_freq = rotary_frequencies(policy, dim_head);
    }

    /// Throws ShapeError when a parameter does not fit tokens of `dim` numbers. The message names the parameter, with
    /// `prefix` before its name.
    void expect_parameters(std::string_view prefix, Index dim) const {
        detail::expect_norm(prefix, norm, dim);
        expect_shape(prefix, "to_qkv.weight", to_qkv.weight.shape(), {3 * schedule.inner(), dim});
        expect_shape(prefix, "to_out.weight", to_out.weight.shape(), {dim, schedule.inner()});
        if constexpr (has_bias)
            expect_shape(prefix, "relative_attention_bias.weight", relative_attention_bias.weight.shape(),
                         {schedule.buckets.num_buckets, schedule.heads});
    }

    template <Viewable X>
    TokensTensor<Scalar, P> operator()(const P& policy, const X& x, Mask mask) const {
        auto out = tensor_like(policy, x);
        forward(policy, out.view(), x, mask, false);
        return out;
    }

    /// The result goes to out (b, n, d); `residual` (b, n, d) is added to it if there is one. Saves queries and
    /// attention for backward if `save` says so.
    template <Viewable X>
    Activations forward(const P& policy, TokensView<Scalar> out, const X& x, Mask mask, bool save,
                        TokensView<const Scalar> residual = {}) const {
        expect_parameters("", x.extent(2));
        expect_shape("out", out.shape(), x.shape());
        if (mask) expect_shape("mask", mask.shape(), {x.extent(0), x.extent(1)});
        if (residual) expect_shape("residual", residual.shape(), x.shape());
        return schedule.forward(policy, out, x, mask, parameters(*this), inv_freq, residual, save);
    }

    /// Writes to d_x (b, n, d) the gradient of x plus the terms of `epilogue`, which the norm's vector-Jacobian product
    /// adds. Adds the gradients of the parameters to `gradients`.
    template <Viewable D, Viewable X, std::size_t updates = 0>
    void backward(const P& policy, const Activations& saved, TokensView<Scalar> d_x, const D& d_out, const X& x,
                  Mask mask, Gradients& gradients, const GradientEpilogue<Scalar, P, updates>& epilogue = {}) const {
        expect_parameters("", x.extent(2));
        expect_like<LightAttention>("gradients", *this, gradients);
        expect_shape("saved.kv", saved.kv.shape(), {x.extent(0), x.extent(1), 2 * schedule.inner()});
        schedule.expect_chunks(policy, saved, x);
        expect_shape("d_x", d_x.shape(), x.shape());
        expect_shape("d_out", d_out.shape(), x.shape());
        if (mask) expect_shape("mask", mask.shape(), {x.extent(0), x.extent(1)});
        detail::check_epilogue(epilogue, x);
        schedule.backward(policy, saved, d_x, d_out, x, mask, parameters(*this), inv_freq, parameters(gradients),
                          epilogue);
    }

    /// Decoding, see decode_next of the schedule.
    using DecodeState = typename Schedule::DecodeState;
    static constexpr Index decode_bytes(const LocalAttention& attention, Index heads, Index dim_head, Index batch,
                                        Index max_length) {
        return batch * DecodeWindow::of<P, Scalar>(attention, max_length).rows(max_length) * 2 * heads * dim_head *
               static_cast<Index>(sizeof(Scalar));
    }
    DecodeState make_decode_state(const P& policy, Index batch, Index max_length) const {
        return schedule.make_decode_state(policy, batch, max_length, static_cast<bool>(inv_freq));
    }
    void decode_next(const P& policy, DecodeState& state, const NextTokens<P>& next, TokensView<Scalar> out,
                     TokensView<const Scalar> x, TokensView<const Scalar> residual) const {
        schedule.decode_next(policy, state, next, out, x, next.mask(), parameters(*this), inv_freq, residual);
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        Norm<Scalar, P>::each_parameter(f, name_for<F>(prefix, "norm."), m.norm...);
        Linear<Scalar, P>::each_parameter(f, name_for<F>(prefix, "to_qkv."), m.to_qkv...);
        Linear<Scalar, P>::each_parameter(f, name_for<F>(prefix, "to_out."), m.to_out...);
        if constexpr (has_bias)
            RelativeAttentionBias<Scalar, P>::each_parameter(f, name_for<F>(prefix, "relative_attention_bias."),
                                                             m.relative_attention_bias...);
        if constexpr (requires { f.buffer(prefix, m.inv_freq...); })
            if (first_of(m...).inv_freq) f.buffer(name_for<F>(prefix, "attn_fn.rel_pos.inv_freq"), m.inv_freq...);
    }

private:
    /// Of the module or of its gradients.
    template <typename M>
    static auto parameters(M& m) {
        using T = std::remove_pointer_t<decltype(m.to_out.weight.data())>;
        return
            typename Schedule::template Parameters<T>{m.norm.parameters(), m.to_qkv.weight.view(),
                                                      m.to_out.weight.view(), m.relative_attention_bias.weight.view()};
    }
};

}  // namespace colt5
