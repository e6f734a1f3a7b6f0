// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

#include <colt5/cuda/kernel.cuh>
#include <colt5/cuda/traits.cuh>
#include <colt5/op/gradient_epilogue.hpp>

namespace colt5 {

namespace cuda {

/// A GradientEpilogue as kernels take it, by value.
template <typename T, int updates>
struct EpilogueTerms {
    using Sum = accumulate_t<T>;
    static constexpr int places = updates > 0 ? updates : 1;  // an array cannot have 0 elements
    struct Update {
        const Sum* s;
        Index stride;  // of s, from a sequence to the next
        const T* t;
        Sum scale;
    };
    const T* residual;
    Update update[places];
    Index length;  // of a sequence

    /// scale · s of each update, for a row of d_x.
    __device__ void load_s(Sum (&to)[places], Index row) const {
        const Index sequence = updates > 0 ? quotient(row, length) : 0;
#pragma unroll
        for (int r = 0; r < updates; ++r)
            to[r] = update[r].scale * update[r].s[row + sequence * (update[r].stride - length)];
    }
    /// own + residual + Σ s[r] t_r for `width` columns from j on, rounded to T. `own` is the norm's gradient, s comes
    /// from load_s. `residual_row` is read if there is a residual.
    template <int width>
    __device__ Pack<T, width> total(const Sum (&own)[width], const Pack<T, width>& residual_row, const Sum (&s)[places],
                                    Index j) const {
        Sum sum[width];
#pragma unroll
        for (int e = 0; e < width; ++e)
            sum[e] = own[e] + (residual != nullptr ? static_cast<Sum>(residual_row.values[e]) : Sum(0));
#pragma unroll
        for (int r = 0; r < updates; ++r) {
            const auto t = load_pack<width>(update[r].t + j);
#pragma unroll
            for (int e = 0; e < width; ++e) sum[e] += s[r] * static_cast<Sum>(t.values[e]);
        }
        Pack<T, width> out;
#pragma unroll
        for (int e = 0; e < width; ++e) out.values[e] = static_cast<T>(sum[e]);
        return out;
    }
};

template <typename T, std::size_t updates>
auto epilogue_terms(const GradientEpilogue<T, Cuda, updates>& epilogue, Index length) {
    EpilogueTerms<T, static_cast<int>(updates)> terms{
        .residual = epilogue.d_residual.data(), .update = {}, .length = length};
    auto* to = terms.update;
    for (const auto& from : epilogue.rank_one) {
        const Index all = from.s.extent(2);
        *to++ = {from.s.data() + from.route * all + from.first, from.s.extent(1) * all, from.t.data(),
                 static_cast<accumulate_t<T>>(from.scale)};
    }
    return terms;
}

}  // namespace cuda

}  // namespace colt5
