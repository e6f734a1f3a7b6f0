// SPDX-License-Identifier: MIT
#pragma once

#include <string>

#include <colt5/core/tensor.hpp>
#include <colt5/op/relative_position_bias.hpp>

namespace colt5 {

template <typename P>
void dense_attention_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `dense_attention` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void dense_attention_vjp_kernel(const P&, ...) {
    static_assert(
        has_kernel<P>,
        "colt5: no `dense_attention_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// (b, r, k): which keys are real, one set a route. Absent: all of them.
using KeyMask = View<const bool, dynamic, dynamic, dynamic>;

/// A RelativePositionBias of queries and keys that were picked from a sequence, with their positions in it.
template <typename T>
struct RoutedPositionBias : RelativePositionBias<T> {
    /// (b, r, n), each route for its share of the heads, whatever the routes of the keys; absent: 0 … n − 1
    TokensView<const TokenIndex> query_positions;
    TokensView<const TokenIndex> key_positions;  // (b, r, k − null_keys); absent: 0 … k − null_keys − 1
    Index null_keys = 0;                         // at the front, without a position: their bias is 0
};

/// Queries that see no more than their first keys: query i attends to the first counts[i] of the keys of its head's
/// route. The logits get `Bias`, as without.
template <typename Bias = NoBias>
struct FirstKeys : Bias {
    /// (b, g, n), each of g groups for its share of the heads, h / g; negative counts as 0. Absent: all keys
    TokensView<const TokenIndex> counts;
};

/// What the vector-Jacobian product reads.
template <typename Scalar, Policy P>
struct DenseAttentionActivations {
    Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic> out;               // (b, n, h, dim_head)
    Tensor<accumulate_t<Scalar>, P, dynamic, dynamic, dynamic> log_sum_exp;  // (b, h, n)
};

template <typename Scalar, Policy P>
struct DenseAttentionGradients {
    Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic> d_q;                     // (b, n, h, dim_head)
    Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_kv;  // as kv
    Tensor<accumulate_t<Scalar>, P, dynamic, dynamic, dynamic> d_value_scale;      // (b, r, k); empty if unused
};

namespace detail {
template <typename Q, typename KV, typename Scale>
void check_dense_attention(const Q& q, const KV& kv, KeyMask mask, const Scale& value_scale) {
    static_assert(same_scalar<Q, KV>, "colt5: `kv` must have the scalar type of `q`");
    const auto [batch, routes, keys, heads_per_route, two, dim_head] = kv.shape();
    expect_shape("q", q.shape(), {batch, dynamic, routes * heads_per_route, dim_head});
    expect_shape("kv", kv.shape(), {dynamic, dynamic, dynamic, dynamic, 2, dynamic});
    if (mask) expect_shape("mask", mask.shape(), {batch, routes, keys});
    if (value_scale) expect_shape("value_scale", value_scale.shape(), {batch, routes, keys});
    expect_length("q", q.extent(1));
    expect_length("kv", keys);
}
template <typename Q, typename KV, typename T>
void check_routed_bias(const Q& q, const KV& kv, const RoutedPositionBias<T>& bias) {
    check_bias(bias, q.extent(2));
    if (bias.query_positions) {
        expect_shape("query_positions", bias.query_positions.shape(), {q.extent(0), dynamic, q.extent(1)});
        const Index routes = bias.query_positions.extent(1);
        if (routes < 1 || q.extent(2) % routes != 0)
            expect_value(false, "routes of query_positions",
                         colt5::detail::concat({"a divisor of ", std::to_string(q.extent(2)), " heads"}), routes);
    }
    const Index keys = kv.extent(2);
    if (!is_range_of(bias.null_keys, 0, keys))
        expect_value(false, "null_keys", colt5::detail::concat({"in [0, ", std::to_string(keys), "], the keys of kv"}),
                     bias.null_keys);
    if (bias.key_positions)
        expect_shape("key_positions", bias.key_positions.shape(), {kv.extent(0), kv.extent(1), keys - bias.null_keys});
}
template <typename Q, typename KV>
void check_routed_bias(const Q&, const KV&, NoBias) {}
template <typename Q, typename KV, typename Bias>
void check_routed_bias(const Q& q, const KV& kv, const FirstKeys<Bias>& bias) {
    check_routed_bias(q, kv, static_cast<const Bias&>(bias));
    if (!bias.counts) return;
    expect_shape("counts", bias.counts.shape(), {q.extent(0), dynamic, q.extent(1)});
    const Index groups = bias.counts.extent(1);
    if (groups < 1 || q.extent(2) % groups != 0)
        expect_value(false, "groups of counts",
                     colt5::detail::concat({"a divisor of ", std::to_string(q.extent(2)), " heads"}), groups);
}
}  // namespace detail

/// Every query attends to every real key of its head's route; values are multiplied by a scale per key:
///
///     out[i] = Σ_j softmax_j(q[i]·k[j] / √dim_head) · value_scale[j] · v[j]   over mask[j]
///
///     q (b, n, h, dim_head), kv (b, r, k, h / r, 2, dim_head): keys and values, head = route · (h / r) + head in
///     route, mask and value_scale (b, r, k), each may be absent  →  out (b, n, h, dim_head)
///
/// With a RoutedPositionBias the logits are q[i]·k[j] / √dim_head + bias(position of j − position of i). With FirstKeys
/// the sum is over j < counts[i].
///
/// A query that sees no key gets zeros and no gradient. Nothing of size n × k is stored. Throws ShapeError when the
/// inputs do not fit together, ValueError when n or k is 2^31 or more.
template <Policy P, Viewable Q, Viewable KV, typename Bias = NoBias>
auto dense_attention_forward(const P& policy, const Q& q, const KV& kv, KeyMask mask,
                             TokensView<const accumulate_t<typename Q::value_type>> value_scale,
                             const Bias& bias = {}) {
    using Scalar = typename Q::value_type;
    detail::check_dense_attention(q, kv, mask, value_scale);
    detail::check_routed_bias(q, kv, bias);
    const auto [batch, length, heads, dim_head] = q.shape();
    DenseAttentionActivations<Scalar, P> saved{{policy, q.shape()}, {policy, {batch, heads, length}}};
    dense_attention_kernel(policy, saved.out.view(), saved.log_sum_exp.view(), heads_of_kernel<P>(q), kv.const_view(),
                           mask, value_scale, bias);
    return saved;
}

/// Vector-Jacobian product, as in local_attention; with v' = value_scale · v:  dv[j] = value_scale[j] dv'[j],
/// d_value_scale[j] = Σ over the route's heads of dv'[j]·v[j]. With a bias, its gradient is added to d_table
/// (num_buckets, h).
template <Policy P, typename Scalar, Viewable Out, Viewable Q, Viewable KV, typename Bias = NoBias,
          typename DTable = NoBias>
auto dense_attention_vjp(const P& policy, const DenseAttentionActivations<Scalar, P>& saved, const Out& d_out,
                         const Q& q, const KV& kv, KeyMask mask, TokensView<const accumulate_t<Scalar>> value_scale,
                         const Bias& bias = {}, const DTable& d_table = {}) {
    detail::check_dense_attention(q, kv, mask, value_scale);
    detail::check_routed_bias(q, kv, bias);
    detail::check_bias_gradient(bias, d_table);
    static_assert(same_scalar<decltype(saved.out), Out, Q>,
                  "colt5: `d_out` and `q` must have the scalar type of `saved`");
    expect_shape("q", q.shape(), saved.out.shape());
    expect_shape("saved.log_sum_exp", saved.log_sum_exp.shape(), {q.extent(0), q.extent(2), q.extent(1)});
    expect_shape("d_out", d_out.shape(), saved.out.shape());
    DenseAttentionGradients<Scalar, P> d{{policy, q.shape()}, {policy, kv.shape()}, {}};
    if (value_scale) d.d_value_scale = {policy, value_scale.shape()};
    dense_attention_vjp_kernel(policy, d.d_q.view(), d.d_kv.view(), d.d_value_scale.view(), d_out.const_view(),
                               saved.out.const_view(), saved.log_sum_exp.const_view(), heads_of_kernel<P>(q),
                               kv.const_view(), mask, value_scale, bias, d_table);
    return d;
}

}  // namespace colt5
