// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <colt5/core/norm.hpp>
#include <colt5/cuda/column_sums.cuh>
#include <colt5/cuda/kernel.cuh>
#include <colt5/op/route_logits.hpp>

namespace colt5 {

namespace cuda {

inline constexpr int routes_at_once = 4, route_threads = sum_threads;

/// The offset in the logits (b, routes, n) of the logit of a row of x (b · n, d) for route `first_route`. The logit of
/// the next route is n entries further.
struct LogitPlace {
    Index length, routes, first_route;
    __device__ Index operator()(Index row) const {
        const Index sample = routes == 1 ? 0 : row / length;  // divisions are slow
        return row + (sample * (routes - 1) + first_route) * length;
    }
};

/// The largest of a norm and cosine_norm_floor; NaN stays NaN.
template <typename Sum>
__device__ Sum at_least_floor(Sum norm) {
    constexpr Sum floor = static_cast<Sum>(cosine_norm_floor);
    return norm < floor ? floor : norm;
}

/// The norm of a row of x. `square` is the sum of its squares. If that has overflowed, the warp sums the squares of
/// scaled entries instead.
template <int width, typename T, typename Sum>
__device__ Sum norm_of_row(const T* in, Index d, Sum square) {
    if (square <= std::numeric_limits<Sum>::max()) return at_least_floor(std::sqrt(square));
    Sum sum = 0;
    for (Index j = lane_id() * width; j < d; j += warp_size * width) {
        const auto pack = load_pack<width>(in + j);
        for (int e = 0; e < width; ++e) {
            const Sum scaled = static_cast<Sum>(pack.values[e]) * scale_of_large<Sum>;
            sum += scaled * scaled;
        }
    }
    return std::sqrt(warp_sum(sum)) / scale_of_large<Sum>;
}

/// a · b / (‖a‖ ‖b‖), where `product` is a · b. If that has overflowed, the warp sums products of scaled entries
/// instead.
template <int width, typename T, typename Sum>
__device__ Sum cosine_of_rows(const T* a, const T* b, Index d, Sum product, Sum norm_a, Sum norm_b) {
    if (isfinite(product)) return product / norm_a / norm_b;
    constexpr Sum unit = scale_of_large<Sum>;
    Sum sum = 0;
    for (Index j = lane_id() * width; j < d; j += warp_size * width) {
        const auto of_a = load_pack<width>(a + j), of_b = load_pack<width>(b + j);
        for (int e = 0; e < width; ++e)
            sum += static_cast<Sum>(of_a.values[e]) * unit * (static_cast<Sum>(of_b.values[e]) * unit);
    }
    return warp_sum(sum) / (norm_a * unit) / (norm_b * unit);
}

/// Norms for kernels with `cosine`; other kernels do not read this.
template <typename Sum>
struct Cosine {
    Sum* norms = nullptr;              // (b · n), written
    const Sum* token_norms = nullptr;  // (r)
};
template <typename Sum>
struct CosineVjp {
    const Sum *logits = nullptr, *norms = nullptr, *token_norms = nullptr;
};

/// The logits of `routes` routes from place.first_route on. A warp has two rows of x at a time, and reads each once.
template <typename T, int width, int routes, bool cosine = false>
__global__ void __launch_bounds__(route_threads)
    route_logits(accumulate_t<T>* logits, const T* x, const T* token, Index rows, Index d, LogitPlace place,
                 accumulate_t<T> scale, Cosine<accumulate_t<T>> norms) {
    using Sum = accumulate_t<T>;
    constexpr int rows_at_once = 2;
    const Index lane = threadIdx.x % warp_size, warps = grid_threads() / warp_size;
    for (Index first = global_thread() / warp_size * rows_at_once; first < rows; first += warps * rows_at_once) {
        Sum sum[rows_at_once][routes] = {};
        [[maybe_unused]] Sum square[rows_at_once] = {};
        const T* const in[rows_at_once] = {x + first * d, x + ::min(first + 1, rows - 1) * d};
#pragma unroll 4
        for (Index j = lane * width; j < d; j += warp_size * width) {
            Pack<T, width> entries[rows_at_once];
            for (int i = 0; i < rows_at_once; ++i) entries[i] = load_pack<width>(in[i] + j);
            if constexpr (cosine)
                for (int i = 0; i < rows_at_once; ++i)
                    for (int e = 0; e < width; ++e)
                        square[i] += static_cast<Sum>(entries[i].values[e]) * static_cast<Sum>(entries[i].values[e]);
            for (int r = 0; r < routes; ++r) {
                const auto weights = load_pack<width>(token + (place.first_route + r) * d + j);
                for (int i = 0; i < rows_at_once; ++i)
                    for (int e = 0; e < width; ++e)
                        sum[i][r] += static_cast<Sum>(entries[i].values[e]) * static_cast<Sum>(weights.values[e]);
            }
        }
        for (int i = 0; i < rows_at_once; ++i) {
            [[maybe_unused]] Sum norm = 1;
            if constexpr (cosine) {
                norm = norm_of_row<width>(in[i], d, warp_sum(square[i]));
                if (lane == 0 && first + i < rows) norms.norms[first + i] = norm;
            }
            for (int r = 0; r < routes; ++r) {
                Sum total = warp_sum(sum[i][r]);
                if constexpr (cosine)
                    total = cosine_of_rows<width>(in[i], token + (place.first_route + r) * d, d, total, norm,
                                                  norms.token_norms[place.first_route + r]);
                const Index row = first + i;
                if (lane == 0 && row < rows) logits[place(row) + r * place.length] = scale * total;
            }
        }
    }
}

/// Adds to d_x, and writes the sums of d_token over a block's rows to partial (blocks, routes, d). A block covers
/// `lanes` packs of columns, and route_threads / lanes rows at a time. Rows whose d_logits are 0 are not read. With
/// `cosine` the sums are Σ ds · scale · x̂ / ‖t‖, from which the operation subtracts the part along t.
template <typename T, int width, int routes, bool cosine = false>
__global__ void __launch_bounds__(route_threads)
    route_logits_vjp(T* d_x, accumulate_t<T>* partial, const accumulate_t<T>* d_logits, const T* x, const T* token,
                     Index rows, Index rows_per_block, Index d, LogitPlace place, int lanes, accumulate_t<T> scale,
                     CosineVjp<accumulate_t<T>> saved) {
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
            [[maybe_unused]] Sum along[rows_at_once] = {};
            bool any[rows_at_once];
            for (int i = 0; i < rows_at_once; ++i) {
                const Index row = first + i * groups;
                any[i] = false;
                for (int r = 0; r < routes; ++r) {
                    s[i][r] = row < end ? scale * d_logits[place(row) + r * place.length] : Sum(0);
                    any[i] = any[i] || s[i][r] != Sum(0);
                    if constexpr (cosine) {
                        if (s[i][r] == Sum(0)) continue;
                        const Sum norm = saved.norms[row];
                        const Index at = place(row) + r * place.length;
                        s[i][r] = s[i][r] / norm / saved.token_norms[place.first_route + r];
                        if (norm > static_cast<Sum>(cosine_norm_floor))
                            along[i] += d_logits[at] * saved.logits[at] / norm / norm;
                    }
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
                    if constexpr (cosine) change = -along[i] * static_cast<Sum>(in[i].values[e]);
                    for (int r = 0; r < routes; ++r) {
                        if (routes > 1 && s[i][r] == Sum(0)) continue;  // 0 · ∞ is NaN
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

template <bool cosine, typename T>
void launch_route_logits(const Cuda& policy, TokensView<accumulate_t<T>> logits, TokensView<const T> x,
                         MatrixView<const T> token, accumulate_t<T> scale, Cosine<accumulate_t<T>> norms) {
    const Index length = x.extent(1), d = x.extent(2), rows = x.extent(0) * length, routes = token.extent(0);
    with_pack_size<T>(
        d,
        [&]<int width>(std::integral_constant<int, width>) {
            for_each_route_group(routes, [&]<int at_once>(Index first, std::integral_constant<int, at_once>) {
                launch(policy, cosine ? "cosine_logits" : "route_logits", route_logits<T, width, at_once, cosine>,
                       blocks_for(divide_up(rows, 2) * warp_size, route_threads), route_threads, 0, logits.data(),
                       x.data(), token.data(), rows, d, LogitPlace{length, routes, first}, scale, norms);
            });
        },
        x.data(), token.data());
}

template <bool cosine, typename T>
void launch_route_logits_vjp(const Cuda& policy, TokensView<T> d_x, MatrixView<accumulate_t<T>> d_token,
                             TokensView<const accumulate_t<T>> d_logits, TokensView<const T> x,
                             MatrixView<const T> token, accumulate_t<T> scale, CosineVjp<accumulate_t<T>> saved) {
    const Index length = x.extent(1), d = x.extent(2), rows = x.extent(0) * length, routes = token.extent(0);
    if (rows == 0 || d == 0) return;
    const auto [blocks, rows_per_block] = RowShares(rows, 1024, 64);
    MatrixTensor<accumulate_t<T>, Cuda> partial(policy, {blocks, std::min(routes, Index{routes_at_once}) * d});
    with_pack_size<T>(
        d,
        [&]<int width>(std::integral_constant<int, width>) {
            const int lanes = lanes_of_columns(d, width);
            for_each_route_group(routes, [&]<int at_once>(Index first, std::integral_constant<int, at_once>) {
                launch(policy, cosine ? "cosine_logits_vjp" : "route_logits_vjp",
                       route_logits_vjp<T, width, at_once, cosine>, grid(blocks), route_threads, 0, d_x.data(),
                       partial.data(), d_logits.data(), x.data(), token.data(), rows, rows_per_block, d,
                       LogitPlace{length, routes, first}, lanes, scale, saved);
                const Totals<accumulate_t<T>, 1> total{{d_token.data() + first * d}, at_once * d};
                launch_add_partials(policy, total, partial.data(), blocks);
            });
        },
        d_x.data(), x.data(), token.data());
}

}  // namespace cuda

template <typename T>
void route_logits_kernel(const Cuda& policy, TokensView<accumulate_t<T>> logits, TokensView<const T> x,
                         MatrixView<const T> token, accumulate_t<T> scale) {
    cuda::launch_route_logits<false>(policy, logits, x, token, scale, {});
}

template <typename T>
void route_logits_vjp_kernel(const Cuda& policy, TokensView<T> d_x, MatrixView<accumulate_t<T>> d_token,
                             TokensView<const accumulate_t<T>> d_logits, TokensView<const T> x,
                             MatrixView<const T> token, accumulate_t<T> scale) {
    cuda::launch_route_logits_vjp<false>(policy, d_x, d_token, d_logits, x, token, scale, {});
}

template <typename T>
void cosine_logits_kernel(const Cuda& policy, TokensView<accumulate_t<T>> logits, MatrixView<accumulate_t<T>> norms,
                          TokensView<const T> x, MatrixView<const T> token,
                          VectorView<const accumulate_t<T>> token_norms, accumulate_t<T> scale) {
    cuda::launch_route_logits<true>(policy, logits, x, token, scale, {norms.data(), token_norms.data()});
}

template <typename T>
void cosine_logits_vjp_kernel(const Cuda& policy, TokensView<T> d_x, MatrixView<accumulate_t<T>> d_token,
                              TokensView<const accumulate_t<T>> d_logits, TokensView<const accumulate_t<T>> logits,
                              MatrixView<const accumulate_t<T>> norms, TokensView<const T> x, MatrixView<const T> token,
                              VectorView<const accumulate_t<T>> token_norms, accumulate_t<T> scale) {
    cuda::launch_route_logits_vjp<true>(policy, d_x, d_token, d_logits, x, token, scale,
                                        {logits.data(), norms.data(), token_norms.data()});
}

}  // namespace colt5
