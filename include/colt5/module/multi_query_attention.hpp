// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <utility>

#include <colt5/expr/expr.hpp>
#include <colt5/module/layers.hpp>
#include <colt5/op/dense_attention.hpp>

namespace colt5 {

/// Cross attention whose heads share one key and one value per token of the context (multi-query attention, Shazeer
/// 2019), as in the decoder of the CoLT5 paper. Without biases; the caller has normed the context.
///
///     out = to_out · attention(to_q · rms_norm(x), to_kv · context)
///
///     x (b, n, d), context (b, m, d), mask (b, m) of the context or absent  →  (b, n, d)
template <typename Scalar, Policy P>
struct MultiQueryAttention {
    using Out = TokensTensor<Scalar, P>;

    RMSNorm<Scalar, P> norm;
    Linear<Scalar, P> to_q, to_kv, to_out;  // d → h · dim_head, d → 2 · dim_head (key, then value), h · dim_head → d
    Index heads, dim_head;

    struct Gradients {
        RMSNorm<accumulate_t<Scalar>, P> norm;
        Linear<accumulate_t<Scalar>, P> to_q, to_kv, to_out;
    };
    struct Activations {
        Out out;                                         // (b, n, d)
        Out q, kv;                                       // (b, n, h · dim_head), (b, m, 2 · dim_head)
        DenseAttentionActivations<Scalar, P> attention;  // one query for each token and head
    };

    MultiQueryAttention(const P& policy, SeedSequence& seeds, Index dim, Index heads_, Index dim_head_)
        : norm(policy, dim),
          to_q(policy, seeds, dim, detail::expect_heads(heads_, dim_head_), false),
          to_kv(policy, seeds, dim, 2 * dim_head_, false),
          to_out(policy, seeds, heads_ * dim_head_, dim, false),
          heads(heads_),
          dim_head(dim_head_) {}

    /// Throws ShapeError when a parameter does not fit tokens of `dim` numbers. The message names the parameter, with
    /// `prefix` before its name.
    void expect_parameters(std::string_view prefix, Index dim) const {
        expect_shape(prefix, "norm.gamma", norm.gamma.shape(), {dim});
        expect_shape(prefix, "to_q.weight", to_q.weight.shape(), {heads * dim_head, dim});
        expect_shape(prefix, "to_kv.weight", to_kv.weight.shape(), {2 * dim_head, dim});
        expect_shape(prefix, "to_out.weight", to_out.weight.shape(), {dim, heads * dim_head});
    }

    template <Viewable X, Viewable C>
    Activations forward(const P& policy, const X& x, const C& context, Mask mask = {}) const {
        expect_shape("context", context.shape(), {x.extent(0), dynamic, x.extent(2)});
        if (mask) expect_shape("mask", mask.shape(), {x.extent(0), context.extent(1)});
        Activations saved;
        saved.q = to_q(policy, norm(policy, x));  // (b, n, h · dim_head)
        saved.kv = to_kv(policy, context);        // (b, m, 2 · dim_head)
        saved.attention = dense_attention_forward(policy, queries(saved.q), keys(saved.kv), key_mask(mask), {});
        saved.out = to_out(policy, tokens(saved.attention.out, x.extent(1)));  // (b, n, d)
        return saved;
    }

    /// `out` of forward for kv = to_kv(policy, context), which decode computes once for all tokens of a sequence.
    template <Viewable X>
    Out decode_next(const P& policy, const X& x, const Out& kv, Mask mask) const {
        const auto q = to_q(policy, norm(policy, x));  // (b, n, h · dim_head)
        const auto attention = dense_attention_forward(policy, queries(q), keys(kv), key_mask(mask), {});
        return to_out(policy, tokens(attention.out, x.extent(1)));  // (b, n, d)
    }

    /// Returns d_x (b, n, d). Adds the gradient of the context to d_context (b, m, d).
    template <Viewable D, Viewable X, Viewable C>
    Out backward(const P& policy, const Activations& saved, const D& d_out, const X& x, const C& context, Mask mask,
                 Out& d_context, Gradients& gradients) const {
        expect_shape("d_context", d_context.shape(), context.shape());
        const auto d_attended =
            to_out.backward(policy, d_out, tokens(saved.attention.out, x.extent(1)), gradients.to_out);
        const auto d = dense_attention_vjp(policy, saved.attention, queries(d_attended), queries(saved.q),
                                           keys(saved.kv), key_mask(mask), {});
        const auto d_kv = d.d_kv.const_view().reshape(saved.kv.shape());
        assign(policy, d_context, d_context + to_kv.backward(policy, d_kv, context, gradients.to_kv));
        const auto d_normed =
            to_q.backward(policy, tokens(d.d_q, x.extent(1)), norm(policy, x), gradients.to_q);  // (b, n, d)
        return norm.backward(policy, d_normed, x, gradients.norm);
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        RMSNorm<Scalar, P>::each_parameter(f, name_for<F>(prefix, "norm."), m.norm...);
        Linear<Scalar, P>::each_parameter(f, name_for<F>(prefix, "to_q."), m.to_q...);
        Linear<Scalar, P>::each_parameter(f, name_for<F>(prefix, "to_kv."), m.to_kv...);
        Linear<Scalar, P>::each_parameter(f, name_for<F>(prefix, "to_out."), m.to_out...);
    }

private:
    /// (b, n, h · dim_head) as (b, n · h, 1, dim_head): one head with the keys that all share.
    auto queries(const Out& x) const {
        return x.const_view().reshape(std::array{x.extent(0), x.extent(1) * heads, Index{1}, dim_head});
    }
    /// (b, n · h, 1, dim_head) as (b, n, h · dim_head).
    template <typename Q>
    auto tokens(const Q& q, Index length) const {
        return q.const_view().reshape(std::array{q.extent(0), length, heads * dim_head});
    }
    auto keys(const Out& kv) const {
        return kv.const_view().reshape(std::array{kv.extent(0), Index{1}, kv.extent(1), Index{1}, Index{2}, dim_head});
    }
    static KeyMask key_mask(Mask mask) {
        return mask ? mask.reshape(std::array{mask.extent(0), Index{1}, mask.extent(1)}) : KeyMask();
    }
};

}  // namespace colt5
