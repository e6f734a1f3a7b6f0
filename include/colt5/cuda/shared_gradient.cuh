// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstddef>

#include <colt5/cuda/launch.cuh>
#include <colt5/cuda/pack.cuh>
#include <colt5/op/shared_gradient.hpp>

namespace colt5 {

/// Their sums stay in registers: as many as a feedforward or an attention with one route of keys and values has.
template <>
inline constexpr std::size_t most_routes_on_the_way<Cuda> = 2;

namespace cuda {

/// A SharedGradient as kernels take it, by value.
template <typename T, int routes>
struct SharedTerms {
    using Sum = accumulate_t<T>;
    static constexpr int places = routes > 0 ? routes : 1;  // there are no arrays of nothing
    struct Route {
        const Sum* d_logits;
        Index stride;  // from a sequence to the next
        const T* token;
        Sum scale;
    };
    const T* add;
    Route route[places];
    Index length;  // of a sequence

    /// Times the scale, for the row of d_x.
    __device__ void d_logits(Sum (&to)[places], Index row) const {
        const Index sequence = routes > 0 ? quotient(row, length) : 0;
#pragma unroll
        for (int r = 0; r < routes; ++r)
            to[r] = route[r].scale * route[r].d_logits[row + sequence * (route[r].stride - length)];
    }
    /// `own` and all that goes to the entries from column j on besides, rounded. `add_row` is read if there is one.
    template <int width>
    __device__ Pack<T, width> total(const Sum (&own)[width], const Pack<T, width>& add_row,
                                    const Sum (&d_logits)[places], Index j) const {
        Sum sum[width];
#pragma unroll
        for (int e = 0; e < width; ++e)
            sum[e] = own[e] + (add != nullptr ? static_cast<Sum>(add_row.values[e]) : Sum(0));
#pragma unroll
        for (int r = 0; r < routes; ++r) {
            const auto token = load_pack<width>(route[r].token + j);
#pragma unroll
            for (int e = 0; e < width; ++e) sum[e] += d_logits[r] * static_cast<Sum>(token.values[e]);
        }
        Pack<T, width> out;
#pragma unroll
        for (int e = 0; e < width; ++e) out.values[e] = static_cast<T>(sum[e]);
        return out;
    }
};

/// (rows, d) → (1, rows, d)
template <typename T>
auto one_sequence(MatrixView<T> rows) {
    return rows.reshape(std::array{Index{1}, rows.extent(0), rows.extent(1)});
}

template <typename T, std::size_t routes>
auto shared_terms(const SharedGradient<T, Cuda, routes>& shared, Index length) {
    SharedTerms<T, static_cast<int>(routes)> terms{.add = shared.add.data(), .route = {}, .length = length};
    auto* to = terms.route;
    for (const auto& from : shared.of_routes) {
        const Index all = from.d_logits.extent(2);
        *to++ = {from.d_logits.data() + from.route * all + from.first, from.d_logits.extent(1) * all, from.token.data(),
                 static_cast<accumulate_t<T>>(from.scale)};
    }
    return terms;
}

}  // namespace cuda

}  // namespace colt5
