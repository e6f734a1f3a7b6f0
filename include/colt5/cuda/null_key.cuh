// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/null_key.hpp>

namespace colt5 {

namespace cuda {

/// Where entry j of the null row of a route is in null_kv (2, h, dim_head); the row is (h / r, 2, dim_head).
struct NullRow {
    Index per_route, dim_head, heads;
    __device__ Index operator()(Index route, Index j) const {
        const Index part = quotient(j, dim_head), head = route * per_route + part / 2;
        return (part % 2 * heads + head) * dim_head + j - part * dim_head;
    }
};

/// One warp for each row of out (b · r, keys + 1, columns): the first one is the null row, the others are those of kv.
template <typename T, int width>
__global__ void with_null_key(T* out, bool* out_mask, accumulate_t<T>* out_scale, const T* kv, const T* null_kv,
                              const bool* mask, const accumulate_t<T>* scale, NullRow null, Index routes, Index keys,
                              Index columns, Index rows) {
    const Index lane = lane_id();
    for (Index row = global_thread() / warp_size; row < rows; row += grid_threads() / warp_size) {
        const Index set = quotient(row, keys + 1), key = row - set * (keys + 1) - 1, from = set * keys + key;
        for (Index j = lane * width; j < columns; j += warp_size * width) {
            Pack<T, width> pack;
            if (key >= 0)
                pack = load_pack<width>(kv + from * columns + j);
            else
                for (int e = 0; e < width; ++e) pack.values[e] = null_kv[null(set % routes, j + e)];
            store_pack(out + row * columns + j, pack);
        }
        if (lane != 0) continue;
        if (mask != nullptr) out_mask[row] = key < 0 || mask[from];
        if (scale != nullptr) out_scale[row] = key < 0 ? accumulate_t<T>(1) : scale[from];
    }
}

/// The rows of d_out (b · r, keys + 1, columns) without the null rows.
template <typename T, int width>
__global__ void without_null_key(T* d_kv, accumulate_t<T>* d_scale, const T* d_out, const accumulate_t<T>* d_out_scale,
                                 Index keys, Index columns, Index rows) {
    const Index lane = lane_id();
    for (Index row = global_thread() / warp_size; row < rows; row += grid_threads() / warp_size) {
        const Index from = row + quotient(row, keys) + 1;
        for (Index j = lane * width; j < columns; j += warp_size * width)
            store_pack(d_kv + row * columns + j, load_pack<width>(d_out + from * columns + j));
        if (lane == 0 && d_scale != nullptr) d_scale[row] = d_out_scale[from];
    }
}

/// One thread for each entry of the null rows of all routes; it sums over the batch in order. d_out (b · r, keys,
/// columns), null rows first.
template <typename T>
__global__ void add_null_key_gradients(accumulate_t<T>* d_null_kv, const T* d_out, NullRow null, Index batch,
                                       Index routes, Index keys, Index columns) {
    for (Index i = global_thread(); i < routes * columns; i += grid_threads()) {
        const Index route = quotient(i, columns), j = i - route * columns;
        accumulate_t<T> sum = 0;
        for (Index b = 0; b < batch; ++b)
            sum += static_cast<accumulate_t<T>>(d_out[(b * routes + route) * keys * columns + j]);
        d_null_kv[null(route, j)] += sum;
    }
}

}  // namespace cuda

template <typename T>
void with_null_key_kernel(const Cuda& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> out,
                          View<bool, dynamic, dynamic, dynamic> out_mask, TokensView<accumulate_t<T>> out_scale,
                          View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv,
                          TokensView<const T> null_kv, KeyMask mask, TokensView<const accumulate_t<T>> value_scale) {
    constexpr int threads = 256;
    const Index routes = kv.extent(1), keys = kv.extent(2), per_route = kv.extent(3), dim = kv.extent(5);
    const Index columns = per_route * 2 * dim, rows = kv.extent(0) * routes * (keys + 1);
    const cuda::NullRow null{per_route, dim, routes * per_route};
    cuda::with_pack_size<T>(
        columns,
        [&]<int width>(std::integral_constant<int, width>) {
            cuda::launch(policy, "with_null_key", cuda::with_null_key<T, width>,
                         cuda::blocks_for(rows * cuda::warp_size, threads), threads, 0, out.data(), out_mask.data(),
                         out_scale.data(), kv.data(), null_kv.data(), mask.data(), value_scale.data(), null, routes,
                         keys, columns, rows);
        },
        out.data(), kv.data());
}

template <typename T>
void null_key_vjp_kernel(const Cuda& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_kv,
                         TokensView<accumulate_t<T>> d_scale,
                         View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_out,
                         TokensView<const accumulate_t<T>> d_out_scale) {
    constexpr int threads = 256;
    const Index keys = d_kv.extent(2), columns = d_kv.extent(3) * 2 * d_kv.extent(5);
    const Index rows = d_kv.extent(0) * d_kv.extent(1) * keys;
    cuda::with_pack_size<T>(
        columns,
        [&]<int width>(std::integral_constant<int, width>) {
            cuda::launch(policy, "without_null_key", cuda::without_null_key<T, width>,
                         cuda::blocks_for(rows * cuda::warp_size, threads), threads, 0, d_kv.data(), d_scale.data(),
                         d_out.data(), d_out_scale.data(), keys, columns, rows);
        },
        d_kv.data(), d_out.data());
}

template <typename T>
void null_key_gradient_kernel(const Cuda& policy, TokensView<accumulate_t<T>> d_null_kv,
                              View<const T, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_out) {
    constexpr int threads = 256;
    const Index batch = d_out.extent(0), routes = d_out.extent(1), keys = d_out.extent(2), per_route = d_out.extent(3);
    const Index dim = d_out.extent(5), columns = per_route * 2 * dim;
    const cuda::NullRow null{per_route, dim, routes * per_route};
    cuda::launch(policy, "add_null_key_gradients", cuda::add_null_key_gradients<T>,
                 cuda::blocks_for(routes * columns, threads), threads, 0, d_null_kv.data(), d_out.data(), null, batch,
                 routes, keys, columns);
}

}  // namespace colt5
