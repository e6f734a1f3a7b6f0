// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <limits>
#include <string>

#include <colt5/core/tensor.hpp>
#include <colt5/op/zero.hpp>

namespace colt5 {

template <typename P>
void append_keys_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `append_keys` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// A cache of the keys and values of routed tokens, in the order of the sequence: null keys first, then room for
/// `capacity` tokens of each route. It takes bytes(b, r, capacity, width, null_keys).
template <typename T, Policy P>
struct RoutedKeys {
    static constexpr TokenIndex no_position = std::numeric_limits<TokenIndex>::max();  // where there is no key yet

    Tensor<T, P, dynamic, dynamic, dynamic, dynamic> kv;                // (b, r, null_keys + capacity, width)
    Tensor<accumulate_t<T>, P, dynamic, dynamic, dynamic> value_scale;  // (b, r, null_keys + capacity)
    Tensor<TokenIndex, P, dynamic, dynamic, dynamic> positions;         // (b, r, capacity)
    MatrixTensor<TokenIndex, P> counts;                                 // (b, r): keys so far, without null keys

    RoutedKeys() = default;
    /// Empty; null keys are 0 and left to the caller.
    RoutedKeys(const P& policy, Index batch, Index routes, Index capacity, Index width, Index null_keys)
        : kv(policy, {batch, routes, null_keys + capacity, width}),
          value_scale(policy, {batch, routes, null_keys + capacity}),
          positions(policy, {batch, routes, capacity}),
          counts(policy, {batch, routes}) {
        set_zero(policy, kv);
        set_zero(policy, value_scale);
        fill(policy, positions, no_position);
        set_zero(policy, counts);
    }

    /// b · r · ((null_keys + capacity) · (width · sizeof(T) + sizeof(accumulate_t<T>)) + 4 · capacity + 4)
    static constexpr Index bytes(Index batch, Index routes, Index capacity, Index width, Index null_keys) {
        constexpr Index index = sizeof(TokenIndex), value = sizeof(T), scale = sizeof(accumulate_t<T>);
        return batch * routes * ((null_keys + capacity) * (width * value + scale) + index * capacity + index);
    }
    Index null_keys() const { return kv.extent(2) - positions.extent(2); }

    template <typename F, typename... Keys>
    static void each_tensor(F&& f, const std::string& prefix, Keys&... keys) {
        f(prefix + "kv", keys.kv...);
        f(prefix + "value_scale", keys.value_scale...);
        f(prefix + "positions", keys.positions...);
        f(prefix + "counts", keys.counts...);
    }
};

/// Appends to each route its live keys, which must be the first ones of the route:
///
///     kv (b, r, k, width), value_scale, positions and live (b, r, k)
///
/// Keys beyond the capacity are dropped. Throws ShapeError when the inputs do not fit together.
template <typename T, Policy P, Viewable KV>
void append_keys(const P& policy, RoutedKeys<T, P>& keys, const KV& kv, TokensView<const accumulate_t<T>> value_scale,
                 TokensView<const TokenIndex> positions, TokensView<const bool> live) {
    static_assert(std::same_as<typename KV::value_type, T>, "colt5: `kv` must have the scalar type of `keys`");
    const auto [batch, routes, count, width] = kv.shape();
    const std::array<Index, 3> picks{batch, routes, count};
    expect_shape("kv", kv.shape(), {keys.kv.extent(0), keys.kv.extent(1), dynamic, keys.kv.extent(3)});
    expect_shape("value_scale", value_scale.shape(), picks);
    expect_shape("positions", positions.shape(), picks);
    expect_shape("live", live.shape(), picks);
    append_keys_kernel(policy, keys.kv.view(), keys.value_scale.view(), keys.positions.view(), keys.counts.view(),
                       kv.const_view(), value_scale, positions, live);
}

}  // namespace colt5
