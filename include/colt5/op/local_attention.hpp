// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <string>

#include <colt5/core/tensor.hpp>
#include <colt5/op/relative_position_bias.hpp>

namespace colt5 {

template <typename P>
void local_attention_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `local_attention` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void local_attention_vjp_kernel(const P&, ...) {
    static_assert(
        has_kernel<P>,
        "colt5: no `local_attention_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// What a query gets whose window holds no real token.
enum class MaskedRows {
    zero,         ///< zeros, and no gradient
    window_mean,  ///< what local-attention 1.8.6 computes: the mean over the values of the three windows of reach
                  ///< tokens around it, where padding up to a multiple of reach counts as 0 and whole windows beyond it
                  ///< as −1. Meaningless; there to reproduce the reference's numbers in padded rows
};

/// What MaskedRows::window_mean of token i reads: tokens [begin, end), those of i's window and of its two neighbours.
/// `out_of_grid` counts the slots of windows that lie wholly outside the sequence; their values are −1. The relation is
/// symmetric: the mean of token i reads token j exactly if the mean of j reads i. So the gradient uses this, too.
struct WindowSlots {
    COLT5_HOST_DEVICE WindowSlots(Index i, Index window, Index length) {
        const Index first = (i / window - 1) * window, last = (i / window + 2) * window;
        const Index grid = round_up(length, window);
        begin = first > 0 ? first : 0;
        end = last < length ? last : length;
        out_of_grid = (first < 0 ? -first : 0) + (last > grid ? last - grid : 0);
    }
    Index begin, end, out_of_grid;
};

/// Each token attends to the real tokens at distance `reach` or less, and with `causal` to none after itself:
///
///     out[i] = Σ_j softmax_j(q[i]·k[j] / √dim_head) v[j]   over |i − j| ≤ reach, mask[j]; with `causal`, j ≤ i
///
///     q (b, n, h, dim_head), kv (b, n, 2, h, dim_head): keys and values, mask (b, n) or absent
///     →  out (b, n, h, dim_head)
///
/// With a RelativePositionBias the logits are q[i]·k[j] / √dim_head + bias(j − i); by default there is NoBias.
///
/// Nothing of size n × reach is stored. A long sequence may come in chunks, in order: q then holds the m queries from
/// token `first` on, and b is 1; keys, values and mask are those of the whole sequence. With `causal`, keys and values
/// after the last query are not read: they need not exist yet.
struct LocalAttention {
    /// The largest reach that is allowed. Every sequence is shorter than this, so a larger reach would see no more.
    static constexpr Index most_reach = Index{1} << 31;

    Index reach;  ///< tokens to either side, or with `causal` before; the reference's light_window_size / 2
    MaskedRows masked_rows = MaskedRows::zero;
    /// Without a mask, queries also attend to keys and values of 0 behind the sequence, those that pad it up to a
    /// multiple of reach, as local-attention 1.8.6 does: each such key adds exp(0) to the denominator of the softmax
    /// of the queries that reach it.
    bool attends_to_padding = false;
    /// A token sees itself and the `reach` tokens before it. Goes with MaskedRows::zero; padding behind the sequence is
    /// then never seen.
    bool causal = false;

    /// The number of such keys that query i of a sequence of `length` tokens sees.
    COLT5_HOST_DEVICE static Index padding_seen(Index i, Index length, Index reach) {
        const Index end = round_up(length, reach), last = i + reach + 1 < end ? i + reach + 1 : end;
        return last > length ? last - length : 0;
    }
    /// Whether some query of [.., limit) sees such keys.
    bool sees_padding(Mask mask, Index limit, Index length) const {
        return attends_to_padding && !causal && !mask && padding_seen(limit - 1, length, reach) > 0;
    }

    /// No token whose key or value a query reads is further from the query than this.
    Index halo() const { return std::min(reach, most_reach) * (masked_rows == MaskedRows::window_mean ? 2 : 1); }
    /// The same after the query.
    Index halo_after() const { return causal ? 0 : halo(); }
    /// The queries [first, first + m) give gradients to the keys and values of the `window` tokens from `window_begin`
    /// on.
    Index window_begin(Index first) const { return std::max(Index{0}, first - halo()); }
    Index window(Index first, Index m, Index length) const {
        return std::min(length, first + m + halo_after()) - window_begin(first);
    }
};

/// Kernels compute a sequence in tiles of `queries` queries and `keys` keys, counted from token 0. So the output of a
/// query has the same bits whichever chunk of queries it is in, if the chunk begins at a multiple of `queries`. It also
/// has the same bits if kv begins after token 0, as long as that is at a multiple of `keys` and kv has every key that
/// the query's tile may see: from `reach` before its first query on.
struct LocalGrid {
    Index queries, keys;
};

/// That of a policy's kernels for a scalar type: LocalGridOf<P, T>::of(attention). Policies specialize it.
template <typename P, typename T>
struct LocalGridOf {
    static constexpr LocalGrid of(const LocalAttention&) {
        static_assert(has_kernel<P>,
                      "colt5: no `local_attention` kernel for this policy: include <colt5/cpu.hpp> or "
                      "<colt5/cuda.cuh>");
        return {};
    }
};

/// What the vector-Jacobian product reads: the output, and one log-sum-exp a row and head (−∞ where no key is visible).
template <typename Scalar, Policy P>
struct LocalAttentionActivations {
    Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic> out;               // (b, m, h, dim_head)
    Tensor<accumulate_t<Scalar>, P, dynamic, dynamic, dynamic> log_sum_exp;  // (b, h, m)
};

namespace detail {
template <typename Q, typename KV>
void check_local_attention(const LocalAttention& attention, const Q& q, const KV& kv, Mask mask, Index first) {
    static_assert(same_scalar<Q, KV>, "colt5: `kv` must have the scalar type of `q`");
    const auto [batch, length, two, heads, dim_head] = kv.shape();
    expect_shape("kv", kv.shape(), {dynamic, dynamic, 2, dynamic, dynamic});
    expect_value(attention.reach >= 1, "reach", ">= 1", attention.reach);
    expect_value(attention.reach <= LocalAttention::most_reach, "reach", "at most 2^31", attention.reach);
    expect_value(!attention.causal || attention.masked_rows == MaskedRows::zero, "masked_rows",
                 "MaskedRows::zero with causal", "window_mean");
    if (!is_range_of(first, 0, length))
        expect_value(false, "first", colt5::detail::concat({"in [0, ", std::to_string(length), "], the tokens of kv"}),
                     first);
    if (batch != 1) expect_value(first == 0, "first", "0 unless there is one sequence", first);
    const Index queries = batch == 1 ? q.extent(1) : length;
    expect_shape("q", q.shape(), {batch, std::min(queries, length - first), heads, dim_head});
    if (mask) expect_shape("mask", mask.shape(), {batch, length});
    expect_length("kv", length);
}
template <typename DQKV, typename Q, typename KV>
void check_local_gradient(const LocalAttention& attention, const DQKV& d_qkv, const Q& q, const KV& kv, Index first,
                          Index carried) {
    const auto [batch, queries, heads, dim_head] = q.shape();
    const Index window = attention.window(first, queries, kv.extent(1));
    expect_shape("d_qkv", d_qkv.shape(), {batch, window, 3, heads, dim_head});
    if (carried < 0 || carried > window)
        expect_value(false, "carried",
                     colt5::detail::concat({"in [0, ", std::to_string(window), "], the rows of d_qkv"}), carried);
    if (batch != 1) expect_value(carried == 0, "carried", "0 unless there is one sequence", carried);
}
}  // namespace detail

/// Forward that saves what backward reads.
template <Policy P, Viewable Q, Viewable KV, typename Bias = NoBias>
auto local_attention_forward(const P& policy, const LocalAttention& attention, const Q& q, const KV& kv, Mask mask,
                             Index first = 0, const Bias& bias = {}) {
    using Scalar = typename Q::value_type;
    detail::check_local_attention(attention, q, kv, mask, first);
    detail::check_bias(bias, q.extent(2));
    const auto [batch, queries, heads, dim_head] = q.shape();
    LocalAttentionActivations<Scalar, P> saved{{policy, q.shape()}, {policy, {batch, heads, queries}}};
    local_attention_kernel(policy, saved.out.view(), saved.log_sum_exp.view(), heads_of_kernel<P>(q), kv.const_view(),
                           mask, first, attention, bias);
    return saved;
}

/// Forward alone.
template <Policy P, Viewable Q, Viewable KV, typename Bias = NoBias>
auto local_attention(const P& policy, const LocalAttention& attention, const Q& q, const KV& kv, Mask mask,
                     Index first = 0, const Bias& bias = {}) {
    using Scalar = typename Q::value_type;
    detail::check_local_attention(attention, q, kv, mask, first);
    detail::check_bias(bias, q.extent(2));
    auto out = tensor_like(policy, q);
    local_attention_kernel(policy, out.view(), TokensView<accumulate_t<Scalar>>{}, heads_of_kernel<P>(q),
                           kv.const_view(), mask, first, attention, bias);
    return out;
}

/// Vector-Jacobian product from the output and the log-sum-exp: the probabilities p are recomputed from
/// q, k and the log-sum-exp. With D = out·d_out:
///
///     dv[j] = Σ_i p_ij d_out[i],   ds_ij = p_ij (d_out[i]·v[j] − D_i) / √dim_head
///     dq[i] = Σ_j ds_ij k[j],      dk[j] = Σ_i ds_ij q[i]
///
/// The result goes to d_qkv (b, w, 3, h, dim_head): queries, keys and values, side by side as one projection makes
/// them. Its rows are all tokens, or for a chunk of m queries the `attention.window(first, m, n)` tokens from
/// `attention.window_begin(first)` on. dq of the chunk's queries is assigned. The first `carried` rows hold gradients
/// of keys and values already, from the chunk before, which are added to; dk and dv of the other rows are assigned.
///
/// With a bias, the sums of √dim_head · ds_ij over its buckets are added to d_table (num_buckets, h).
///
/// Throws ValueError when `carried` is not a number of rows, or not 0 where there are several sequences.
template <Policy P, typename Scalar, Viewable D, Viewable Q, Viewable KV, Viewable DQKV, typename Bias = NoBias,
          typename DTable = NoBias>
void local_attention_vjp(const P& policy, const DQKV& d_qkv, const LocalAttention& attention,
                         const LocalAttentionActivations<Scalar, P>& saved, const D& d_out, const Q& q, const KV& kv,
                         Mask mask, Index first, Index carried, const Bias& bias = {}, const DTable& d_table = {}) {
    static_assert(is_output<DQKV>, "colt5: `d_qkv` must be a view to write to, such as tensor.view()");
    detail::check_local_attention(attention, q, kv, mask, first);
    const auto [batch, queries, heads, dim_head] = q.shape();
    static_assert(same_scalar<decltype(saved.out), D, Q, DQKV>,
                  "colt5: `d_out`, `q` and `d_qkv` must have the scalar type of `saved`");
    expect_shape("saved", saved.out.shape(), q.shape());
    expect_shape("saved.log_sum_exp", saved.log_sum_exp.shape(), {batch, heads, queries});
    expect_shape("d_out", d_out.shape(), q.shape());
    detail::check_local_gradient(attention, d_qkv, q, kv, first, carried);
    detail::check_bias(bias, heads);
    detail::check_bias_gradient(bias, d_table);
    local_attention_vjp_kernel(policy, d_qkv.view(), d_out.const_view(), saved.out.const_view(),
                               saved.log_sum_exp.const_view(), heads_of_kernel<P>(q), kv.const_view(), mask, first,
                               carried, attention, bias, d_table);
}

/// The same for whole sequences. Returns d_qkv (b, n, 3, h, dim_head).
template <Policy P, typename Scalar, Viewable D, Viewable Q, Viewable KV, typename Bias = NoBias,
          typename DTable = NoBias>
auto local_attention_vjp(const P& policy, const LocalAttention& attention,
                         const LocalAttentionActivations<Scalar, P>& saved, const D& d_out, const Q& q, const KV& kv,
                         Mask mask, const Bias& bias = {}, const DTable& d_table = {}) {
    const auto [batch, length, heads, dim_head] = q.shape();
    Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic, dynamic> d_qkv(policy, {batch, length, 3, heads, dim_head});
    local_attention_vjp(policy, d_qkv.view(), attention, saved, d_out, q, kv, mask, 0, 0, bias, d_table);
    return d_qkv;
}

}  // namespace colt5
