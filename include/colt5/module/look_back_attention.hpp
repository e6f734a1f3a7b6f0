// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <utility>

#include <colt5/module/light_attention.hpp>
#include <colt5/op/dense_attention.hpp>
#include <colt5/op/look_back.hpp>
#include <colt5/op/swap_first_axes.hpp>

namespace colt5 {

/// The causal light branch of the reference: a sequence is cut into windows; every token sees the tokens of the window
/// before its own, and those of its own window up to itself (LocalMHA of the package local-attention, causal and not
/// `exact_windowsize`).
///
/// LayerNorm → queries, keys and values → attention → output projection; no biases in the projections.
template <typename Scalar, Policy P>
struct LookBackAttention {
    LayerNorm<Scalar, P> norm;
    Linear<Scalar, P> to_qkv, to_out;
    Index heads, dim_head;
    Index window;  ///< tokens

    struct Gradients {
        LayerNorm<accumulate_t<Scalar>, P> norm;
        Linear<accumulate_t<Scalar>, P> to_qkv, to_out;
    };
    struct Activations {
        TokensTensor<Scalar, P> q;                       // (b, n, h · dim_head)
        TokensTensor<Scalar, P> kv;                      // (b, n, h · 2 · dim_head): a key, then a value of each head
        DenseAttentionActivations<Scalar, P> attention;  // its output is (b · n / window, window, h, dim_head)
    };

    LookBackAttention(const P& policy, SeedSequence& seeds, Index dim, Index heads_, Index dim_head_, Index window_)
        : norm(policy, dim),
          to_qkv(policy, seeds, dim, 3 * detail::expect_heads(heads_, dim_head_), false),
          to_out(policy, seeds, heads_ * dim_head_, dim, false),
          heads(heads_),
          dim_head(dim_head_),
          window(window_) {}

    void expect_parameters(std::string_view prefix, Index dim) const {
        detail::expect_norm(prefix, norm, dim);
        expect_shape(prefix, "to_qkv.weight", to_qkv.weight.shape(), {3 * inner(), dim});
        expect_shape(prefix, "to_out.weight", to_out.weight.shape(), {dim, inner()});
    }

    /// x (b, n, d), n a multiple of the window  →  out (b, n, d). `residual` is added if there is one.
    template <Viewable X>
    Activations forward(const P& policy, TokensView<Scalar> out, const X& x,
                        TokensView<const Scalar> residual = {}) const {
        expect_parameters("", x.extent(2));
        expect_shape("out", out.shape(), x.shape());
        const Index batch = x.extent(0), length = x.extent(1), dim = x.extent(2);
        const auto normed = norm(policy, x);
        const auto weight = kv_weight(policy, dim);
        Activations saved{linear(policy, normed, q_rows(to_qkv.weight)),
                          linear(policy, normed, as_matrix(weight.const_view(), dim)),
                          {}};
        saved.attention = {{policy, by_window(saved.q.const_view()).shape()},
                           {policy, {batch * length / window, heads, window}}};
        each_part(batch, length, [&](Index first, Index count) {
            const auto of = [&](auto view) { return by_window(sequences(view, first, count)); };
            const auto rows = look_back(policy, sequences(saved.kv.const_view(), first, count), window);
            const auto counts = look_back_counts(policy, count, length / window, window);
            dense_attention_kernel(policy, of(saved.attention.out.view().reshape(saved.q.shape())),
                                   sequences_of_sums(saved.attention.log_sum_exp.view(), first, count, batch),
                                   of(saved.q.const_view()), keys_of(rows), KeyMask(), Scales(),
                                   FirstKeys<>{{}, counts.const_view()});
        });
        to_out(policy, out, saved.attention.out.const_view().reshape(saved.q.shape()), residual);
        return saved;
    }

    /// Returns d_x (b, n, d), and adds the gradients of the parameters to `gradients`. `owned` is `saved` if that may
    /// be freed, or null. Then tensors are freed once they are read, and the gradient of keys and values takes their
    /// memory.
    template <Viewable D, Viewable X>
    TokensTensor<Scalar, P> backward(const P& policy, const Activations& saved, Activations* owned, const D& d_out,
                                     const X& x, Gradients& gradients) const {
        using Sum = accumulate_t<Scalar>;
        const Index batch = x.extent(0), length = x.extent(1), dim = x.extent(2);
        auto d_attended =
            to_out.backward(policy, d_out, saved.attention.out.const_view().reshape(saved.q.shape()), gradients.to_out);
        auto d_q = tensor_like(policy, saved.q);
        const auto kv = saved.kv.const_view();
        // look_back has copied the rows of a part before their gradient is written.
        auto d_kv = owned ? std::move(owned->kv) : tensor_like(policy, saved.kv);
        each_part(batch, length, [&](Index first, Index count) {
            const auto of = [&](auto view) { return by_window(sequences(view, first, count)); };
            const auto rows = look_back(policy, sequences(kv, first, count), window);
            const auto counts = look_back_counts(policy, count, length / window, window);
            auto d_rows = tensor_like(policy, rows);
            dense_attention_vjp_kernel(policy, of(d_q.view()), keys_of(d_rows), TokensView<Sum>(),
                                       of(d_attended.const_view()),
                                       of(saved.attention.out.const_view().reshape(saved.q.shape())),
                                       sequences_of_sums(saved.attention.log_sum_exp.const_view(), first, count, batch),
                                       of(saved.q.const_view()), keys_of(std::as_const(rows)), KeyMask(), Scales(),
                                       FirstKeys<>{{}, counts.const_view()}, NoBias());
            look_back_vjp_kernel(policy, sequences(d_kv.view(), first, count), d_rows.const_view(), window);
        });
        if (owned) {
            owned->q = {};
            owned->attention = {};
        }
        d_attended = {};
        const auto normed = norm(policy, x);
        auto d_normed = linear_vjp(policy, d_q, normed, q_rows(to_qkv.weight), q_rows(gradients.to_qkv.weight));
        const auto weight = kv_weight(policy, dim);
        Tensor<Sum, P, dynamic, dynamic, dynamic, dynamic> d_weight(policy, weight.shape());
        set_zero(policy, d_weight);
        const auto d_of_kv =
            linear_vjp(policy, d_kv, normed, as_matrix(weight.const_view(), dim), as_matrix(d_weight.view(), dim));
        const auto d_kv_rows = kv_rows(gradients.to_qkv.weight);
        assign(policy, d_kv_rows, d_kv_rows + swap_middle_axes(policy, d_weight).view().reshape(d_kv_rows.shape()));
        assign(policy, d_normed, d_normed + d_of_kv);
        return norm.backward(policy, d_normed, x, gradients.norm);
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        LayerNorm<Scalar, P>::each_parameter(f, name_for<F>(prefix, "norm."), m.norm...);
        Linear<Scalar, P>::each_parameter(f, name_for<F>(prefix, "to_qkv."), m.to_qkv...);
        Linear<Scalar, P>::each_parameter(f, name_for<F>(prefix, "to_out."), m.to_out...);
    }

private:
    Index inner() const { return heads * dim_head; }
    /// The rows of to_qkv for queries, and for keys and values.
    template <typename W>
    auto q_rows(W& weight) const {
        return weight.view().range(0, inner());
    }
    template <typename W>
    auto kv_rows(W& weight) const {
        return weight.view().range(inner(), 2 * inner());
    }
    /// The rows of keys and values in the order of dense_attention: (1, h, 2, dim_head · d).
    auto kv_weight(const P& policy, Index dim) const {
        return swap_middle_axes(policy,
                                kv_rows(to_qkv.weight).reshape(std::array<Index, 4>{1, 2, heads, dim_head * dim}));
    }
    template <typename W>
    auto as_matrix(const W& weight, Index dim) const {  // (h · 2 · dim_head, d)
        return weight.reshape(std::array{2 * inner(), dim});
    }
    using Scales = TokensView<const accumulate_t<Scalar>>;

    /// Calls f(first, count) for the sequences of a batch, about 8192 tokens at a time, as look_back copies keys and
    /// values twice.
    template <typename F>
    static void each_part(Index batch, Index length, const F& f) {
        const Index at_once = std::clamp(Index{8192} / std::max(length, Index{1}), Index{1}, std::max(batch, Index{1}));
        for (Index first = 0; first < batch; first += at_once) f(first, std::min(at_once, batch - first));
    }
    template <typename T>
    static TokensView<T> sequences(const TokensView<T>& all, Index first, Index count) {
        return all.range(first, count);
    }
    template <typename T>
    static TokensView<T> sequences_of_sums(const TokensView<T>& all, Index first, Index count, Index batch) {
        const Index windows = all.extent(0) / batch;
        return all.range(first * windows, count * windows);
    }
    template <typename T>
    auto by_window(const TokensView<T>& q) const {  // (b · m, window, h, dim_head)
        return q.reshape(std::array{q.extent(0) * q.extent(1) / window, window, heads, dim_head});
    }
    template <typename T>
    auto keys_of(T& rows) const {  // (b · m, 1, 2 · window, h, 2, dim_head)
        return rows.view().reshape(std::array<Index, 6>{rows.extent(0), 1, rows.extent(1), heads, 2, dim_head});
    }
};

}  // namespace colt5
