// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <type_traits>

#include <colt5/op/dense_attention.hpp>

namespace colt5 {

template <typename P>
void with_null_key_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `with_null_key` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void null_key_vjp_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `null_key_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void null_key_gradient_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `null_key_gradient` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// What dense attention takes, with one key and value more.
template <typename Scalar, Policy P>
struct KeysWithNull {
    Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv;  // (b, r, k + 1, h / r, 2, dim_head)
    Tensor<bool, P, dynamic, dynamic, dynamic> mask;                             // (b, r, k + 1), if there is one
    Tensor<accumulate_t<Scalar>, P, dynamic, dynamic, dynamic> value_scale;      // (b, r, k + 1), if there is one
};
template <typename Scalar, Policy P>
struct NullKeyGradients {
    Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_kv;
    Tensor<accumulate_t<Scalar>, P, dynamic, dynamic, dynamic> d_value_scale;  // if there is a value_scale
};

namespace detail {
/// (b, r, k, …) with `more` keys more
template <std::size_t rank>
std::array<Index, rank> with_more_keys(std::array<Index, rank> shape, Index more) {
    shape[2] += more;
    return shape;
}
template <typename T, typename D>
void expect_null_key_gradient(const TokensView<T>& d_null_kv, const D& d_out) {
    expect_value(d_out.extent(2) >= 1, "keys of d_out", ">= 1", d_out.extent(2));
    expect_shape("d_out", d_out.shape(), {dynamic, dynamic, dynamic, dynamic, 2, dynamic});
    expect_shape("d_null_kv", d_null_kv.shape(), {2, d_out.extent(1) * d_out.extent(3), d_out.extent(5)});
}
}  // namespace detail

/// Puts a null key and value before the keys of each route, for all queries to attend to: it is never masked, and its
/// value is multiplied by 1.
///
///     kv (b, r, k, h / r, 2, dim_head), null_kv (2, h, dim_head), keys, then values, head = route · (h / r) + head in
///     route, mask and value_scale (b, r, k), each may be absent  →  the same with k + 1 keys
///
/// Throws ShapeError when they do not fit together.
template <Policy P, Viewable KV, Viewable Null>
auto with_null_key(const P& policy, const KV& kv, const Null& null_kv, KeyMask mask,
                   TokensView<const accumulate_t<typename KV::value_type>> value_scale) {
    using Scalar = typename KV::value_type;
    static_assert(same_scalar<KV, Null>, "colt5: `null_kv` must have the scalar type of `kv`");
    const auto [batch, routes, keys, per_route, two, dim_head] = kv.shape();
    expect_shape("kv", kv.shape(), {dynamic, dynamic, dynamic, dynamic, 2, dynamic});
    expect_shape("null_kv", null_kv.shape(), {2, routes * per_route, dim_head});
    if (mask) expect_shape("mask", mask.shape(), {batch, routes, keys});
    if (value_scale) expect_shape("value_scale", value_scale.shape(), {batch, routes, keys});
    KeysWithNull<Scalar, P> out{{policy, detail::with_more_keys(kv.shape(), 1)}, {}, {}};
    if (mask) out.mask = {policy, detail::with_more_keys(mask.shape(), 1)};
    if (value_scale) out.value_scale = {policy, detail::with_more_keys(value_scale.shape(), 1)};
    with_null_key_kernel(policy, out.kv.view(), out.mask.view(), out.value_scale.view(), kv.const_view(),
                         TokensView<const Scalar>(null_kv.const_view()), mask, value_scale);
    return out;
}

/// Adds the gradient of null_kv to d_null_kv (2, h, dim_head): the first rows of d_out (b, r, k + 1, h / r, 2,
/// dim_head), the gradient of the keys and values of with_null_key, summed over the batch. Throws ShapeError when they
/// do not fit together, ValueError without a key.
template <Policy P, Viewable D>
void null_key_gradient(const P& policy, TokensView<accumulate_t<typename D::value_type>> d_null_kv, const D& d_out) {
    detail::expect_null_key_gradient(d_null_kv, d_out);
    null_key_gradient_kernel(policy, d_null_kv, d_out.const_view());
}

/// Vector-Jacobian product: d_kv and d_value_scale of with_null_key without the null key's; those of its key and value
/// are added to d_null_kv (2, h, dim_head) as by null_key_gradient.
template <Policy P, Viewable D>
auto null_key_vjp(const P& policy, TokensView<accumulate_t<typename D::value_type>> d_null_kv, const D& d_out,
                  TokensView<const accumulate_t<typename D::value_type>> d_value_scale) {
    using Scalar = typename D::value_type;
    if (d_value_scale)
        expect_shape("d_value_scale", d_value_scale.shape(), {d_out.extent(0), d_out.extent(1), d_out.extent(2)});
    detail::expect_null_key_gradient(d_null_kv, d_out);
    NullKeyGradients<Scalar, P> d{{policy, detail::with_more_keys(d_out.shape(), -1)}, {}};
    if (d_value_scale) d.d_value_scale = {policy, detail::with_more_keys(d_value_scale.shape(), -1)};
    null_key_gradient_kernel(policy, d_null_kv, d_out.const_view());
    null_key_vjp_kernel(policy, d.d_kv.view(), d.d_value_scale.view(), d_out.const_view(), d_value_scale);
    return d;
}

}  // namespace colt5
