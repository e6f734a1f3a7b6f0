// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cpu/parallel.hpp>
#include <colt5/op/null_key.hpp>

namespace colt5 {

template <typename T>
void with_null_key_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> out,
                          View<bool, dynamic, dynamic, dynamic> out_mask, TokensView<T> out_scale,
                          View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv,
                          TokensView<const T> null_kv, KeyMask mask, TokensView<const T> value_scale) {
    const Index routes = kv.extent(1), keys = kv.extent(2), per_route = kv.extent(3), dim = kv.extent(5);
    const Index width = per_route * 2 * dim;
    parallel_for(policy, kv.extent(0) * routes, [&](Index set) {  // a route of a sequence
        T* const to = out.data() + set * (keys + 1) * width;
        for (Index h = 0; h < per_route; ++h)
            for (Index part = 0; part < 2; ++part)
                std::copy_n(&null_kv(part, set % routes * per_route + h, 0), dim, to + (2 * h + part) * dim);
        std::copy_n(kv.data() + set * keys * width, keys * width, to + width);
        if (mask) {
            out_mask.data()[set * (keys + 1)] = true;
            std::copy_n(mask.data() + set * keys, keys, out_mask.data() + set * (keys + 1) + 1);
        }
        if (value_scale) {
            out_scale.data()[set * (keys + 1)] = T(1);
            std::copy_n(value_scale.data() + set * keys, keys, out_scale.data() + set * (keys + 1) + 1);
        }
    });
}

template <typename T>
void null_key_vjp_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_kv,
                         TokensView<T> d_scale,
                         View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_out,
                         TokensView<const T> d_out_scale) {
    const Index batch = d_kv.extent(0), routes = d_kv.extent(1), keys = d_kv.extent(2), per_route = d_kv.extent(3);
    const Index dim = d_kv.extent(5), width = per_route * 2 * dim;
    parallel_for(policy, batch * routes, [&](Index set) {
        std::copy_n(d_out.data() + (set * (keys + 1) + 1) * width, keys * width, d_kv.data() + set * keys * width);
        if (d_out_scale) std::copy_n(d_out_scale.data() + set * (keys + 1) + 1, keys, d_scale.data() + set * keys);
    });
}

template <typename T>
void null_key_gradient_kernel(const Cpu&, TokensView<T> d_null_kv,
                              View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_out) {
    const Index batch = d_out.extent(0), routes = d_out.extent(1), keys = d_out.extent(2), per_route = d_out.extent(3);
    const Index dim = d_out.extent(5), width = per_route * 2 * dim;
    for (Index set = 0; set < batch * routes; ++set)
        for (Index h = 0; h < per_route; ++h)
            for (Index part = 0; part < 2; ++part)
                for (Index i = 0; i < dim; ++i)
                    d_null_kv(part, set % routes * per_route + h, i) +=
                        d_out.data()[set * keys * width + (2 * h + part) * dim + i];
}

}  // namespace colt5
