// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cuda/column_sums.cuh>
#include <colt5/cuda/launch.cuh>
#include <colt5/cuda/pack.cuh>
#include <colt5/op/route_logits.hpp>

namespace colt5 {

namespace cuda {

inline constexpr int routes_at_once = 4, route_threads = sum_threads;

/// The offset of the logit of a row of x (b · n, d) in (b, routes, n), for the first route of some; the next route's
/// logit is n entries further.
struct LogitPlace {
    Index length, routes, first_route;
    __device__ Index operator()(Index row) const {
        const Index sample = routes == 1 ? 0 : row / length;  // divisions are slow
        return row + (sample * (routes - 1) + first_route) * length;
    }
};

/// The logits of `routes` routes from place.first_route on. A warp has two rows of x at a time, and reads each once.
template <typename T, int width, int routes>
__global__ void __launch_bounds__(route_threads)
    route_logits(accumulate_t<T>* logits, const T* x, const T* token, Index rows, Index d, LogitPlace place,
                 accumulate_t<T> scale) {
    using Sum = accumulate_t<T>;
    constexpr int rows_at_once = 2;
    const Index lane = threadIdx.x % warp_size, warps = all_threads() / warp_size;
    for (Index first = global_thread() / warp_size * rows_at_once; first < rows; first += warps * rows_at_once) {
        Sum sum[rows_at_once][routes] = {};
        const T* const in[rows_at_once] = {x + first * d, x + ::min(first + 1, rows - 1) * d};
#pragma unroll 4
        for (Index j = lane * width; j < d; j += warp_size * width) {
            Pack<T, width> entries[rows_at_once];
            for (int i = 0; i < rows_at_once; ++i) entries[i] = load_pack<width>(in[i] + j);
            for (int r = 0; r < routes; ++r) {
                const auto weights = load_pack<width>(token + (place.first_route + r) * d + j);
                for (int i = 0; i < rows_at_once; ++i)
                    for (int e = 0; e < width; ++e)
                        sum[i][r] += static_cast<Sum>(entries[i].values[e]) * static_cast<Sum>(weights.values[e]);
            }
        }
        for (int i = 0; i < rows_at_once; ++i)
            for (int r = 0; r < routes; ++r) {
                const Sum total = warp_sum(sum[i][r]);
                const Index row = first + i;
                if (lane == 0 && row < rows) logits[place(row) + r * place.length] = scale * total;
            }
    }
}

/// Adds to d_x, and writes the sums of d_token over a block's rows to partial (blocks, routes, d). A block covers
/// `lanes` packs of columns, and route_threads / lanes rows at a time. Rows whose d_logits are 0 are not read.
template <typename T, int width, int routes>
__global__ void __launch_bounds__(route_threads)
    route_logits_vjp(T* d_x, accumulate_t<T>* partial, const accumulate_t<T>* d_logits, const T* x, const T* token,
                     Index rows, Index rows_per_block, Index d, LogitPlace place, int lanes, accumulate_t<T> scale) {
    using Sum = accumulate_t<T>;
    constexpr int rows_at_once = 4;  // so that several loads are under way
    __shared__ Sum shared[route_threads][width];
    const Index begin = blockIdx.x * rows_per_block, end = ::min(rows, begin + rows_per_block);
    const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
    const int groups = route_threads / lanes;
    for (Index tile = 0; tile < d; tile += lanes * width) {
        const Index j = tile + lane * width;
        const bool mine = j < d;
        Sum weights[routes][width], sum[routes][width] = {};
        for (int r = 0; r < routes && mine; ++r) {
            const auto pack = load_pack<width>(token + (place.first_route + r) * d + j);
            for (int e = 0; e < width; ++e) weights[r][e] = static_cast<Sum>(pack.values[e]);
        }
        for (Index first = begin + group; first < end && mine; first += rows_at_once * groups) {
            Sum s[rows_at_once][routes];
            bool any[rows_at_once];
            for (int i = 0; i < rows_at_once; ++i) {
                const Index row = first + i * groups;
                any[i] = false;
                for (int r = 0; r < routes; ++r) {
                    s[i][r] = row < end ? scale * d_logits[place(row) + r * place.length] : Sum(0);
                    any[i] = any[i] || s[i][r] != Sum(0);
                }
            }
            Pack<T, width> in[rows_at_once], out[rows_at_once];
            for (int i = 0; i < rows_at_once; ++i)
                if (any[i]) {
                    in[i] = load_pack<width>(x + (first + i * groups) * d + j);
                    out[i] = load_pack<width>(d_x + (first + i * groups) * d + j);
                }
            for (int i = 0; i < rows_at_once; ++i) {
                if (!any[i]) continue;
                for (int e = 0; e < width; ++e) {
                    Sum change = 0;
                    for (int r = 0; r < routes; ++r) {
                        change += s[i][r] * weights[r][e];
                        sum[r][e] += s[i][r] * static_cast<Sum>(in[i].values[e]);
                    }
                    out[i].values[e] = static_cast<T>(static_cast<Sum>(out[i].values[e]) + change);
                }
                store_pack(d_x + (first + i * groups) * d + j, out[i]);
            }
        }
        for (int r = 0; r < routes; ++r)
            sum_over_groups(partial + (blockIdx.x * static_cast<Index>(routes) + r) * d + j, sum[r], shared, lanes,
                            mine);
    }
}

/// Calls body(first, count) for groups of up to four routes; count is 4, 2 or 1 as a compile-time constant.
template <typename Body>
void for_each_route_group(Index routes, Body&& body) {
    for (Index first = 0; first < routes;) {
        const Index left = routes - first;
        if (left >= 4)
            body(first, std::integral_constant<int, 4>());
        else if (left >= 2)
            body(first, std::integral_constant<int, 2>());
        else
            body(first, std::integral_constant<int, 1>());
        first += left >= 4 ? 4 : left >= 2 ? 2 : 1;
    }
}

}  // namespace cuda

template <typename T>
void route_logits_kernel(const Cuda& policy, TokensView<accumulate_t<T>> logits, TokensView<const T> x,
                         MatrixView<const T> token, accumulate_t<T> scale) {
    const Index length = x.extent(1), d = x.extent(2), rows = x.extent(0) * length, routes = token.extent(0);
    cuda::with_pack_size<T>(
        d,
        [&]<int width>(std::integral_constant<int, width>) {
            cuda::for_each_route_group(routes, [&]<int at_once>(Index first, std::integral_constant<int, at_once>) {
                cuda::launch(policy, "route_logits", cuda::route_logits<T, width, at_once>,
                             cuda::blocks_for(divide_up(rows, 2) * cuda::warp_size, cuda::route_threads),
                             cuda::route_threads, 0, logits.data(), x.data(), token.data(), rows, d,
                             cuda::LogitPlace{length, routes, first}, scale);
            });
        },
        x.data(), token.data());
}

template <typename T>
void route_logits_vjp_kernel(const Cuda& policy, TokensView<T> d_x, MatrixView<accumulate_t<T>> d_token,
                             TokensView<const accumulate_t<T>> d_logits, TokensView<const T> x,
                             MatrixView<const T> token, accumulate_t<T> scale) {
    const Index length = x.extent(1), d = x.extent(2), rows = x.extent(0) * length, routes = token.extent(0);
    if (rows == 0 || d == 0) return;
    const auto [blocks, rows_per_block] = cuda::RowShares(rows, 1024, 64);
    MatrixTensor<accumulate_t<T>, Cuda> partial(policy, {blocks, std::min(routes, Index{cuda::routes_at_once}) * d});
    cuda::with_pack_size<T>(
        d,
        [&]<int width>(std::integral_constant<int, width>) {
            const int lanes = cuda::lanes_of_columns(d, width);
            cuda::for_each_route_group(routes, [&]<int at_once>(Index first, std::integral_constant<int, at_once>) {
                cuda::launch(policy, "route_logits_vjp", cuda::route_logits_vjp<T, width, at_once>, cuda::grid(blocks),
                             cuda::route_threads, 0, d_x.data(), partial.data(), d_logits.data(), x.data(),
                             token.data(), rows, rows_per_block, d, cuda::LogitPlace{length, routes, first}, lanes,
                             scale);
                const cuda::Totals<accumulate_t<T>, 1> total{{d_token.data() + first * d}, at_once * d};
                cuda::launch_add_partials(policy, total, partial.data(), blocks);
            });
        },
        d_x.data(), x.data(), token.data());
}

}  // namespace colt5
