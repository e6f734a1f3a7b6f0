// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <colt5/cpu/gather.hpp>
#include <colt5/cpu/nan_row.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/cumulative_softmax.hpp>

namespace colt5 {

namespace cpu {

/// The exponentials of one row and, for every pick, the sum of those ranked at or below it.
template <typename T>
struct CumulativeRow {
    CumulativeRow(TokensView<const T> logits, TokensView<const TokenIndex> indices, Mask mask, double temperature,
                  Index b, Index r)
        : length(logits.extent(2)),
          picks(indices.extent(2)),
          exponential(thread_scratch<T, struct Exponentials>(length)),
          below(thread_scratch<double, struct CumulativeSumsBelow>(picks)),
          index(indices[b][r].data()),
          real(mask ? mask[b].data() : nullptr) {
        const T* const s = logits[b][r].data();
        const T* logit = s;
        if (real) {
            for (Index i = 0; i < length; ++i) exponential[i] = real[i] ? s[i] : -std::numeric_limits<T>::infinity();
            logit = exponential;
        }
        T largest = largest_or_nan(logit, length);
        has_nan = std::isnan(largest);
        if (has_nan) return;
        if (largest == -std::numeric_limits<T>::infinity()) largest = T(0);  // every exponential is 0
        constexpr T most = std::numeric_limits<T>::max();
        const Batch<T> finite(most), top(std::min(largest, most)), inverse(static_cast<T>(1 / temperature));
        for_each_batch<T>(length, [&](Index j, Index width) {
            store(exponential + j, cpu::exp((xsimd::min(finite, load(logit + j, width)) - top) * inverse), width);
        });
        double total = 0;  // of what is not chosen: the picks are taken out first, nothing is subtracted
        for (Index i = 0; i < picks; ++i) exponential[index[i]] = -exponential[index[i]];
        for (Index i = 0; i < length; ++i) total += static_cast<double>(std::max(exponential[i], T(0)));
        for (Index i = 0; i < picks; ++i) exponential[index[i]] = -exponential[index[i]];
        for (Index i = picks; i-- > 0;) below[i] = total += static_cast<double>(exponential[index[i]]);
    }
    Index length, picks;
    T* exponential;
    double* below;
    const TokenIndex* index;
    const bool* real;
    bool has_nan = false;  ///< a real logit is NaN; nothing is computed then
};

}  // namespace cpu

template <typename T>
void cumulative_softmax_kernel(const Cpu& policy, TokensView<T> scores, TokensView<const T> logits,
                               TokensView<const TokenIndex> indices, Mask mask, double temperature) {
    const Index routes = logits.extent(1);
    cpu::check_indices(indices, logits.extent(2));
    parallel_for(policy, logits.extent(0) * routes, [&](Index task) {
        const Index b = task / routes, r = task % routes;
        const cpu::CumulativeRow<T> row(logits, indices, mask, temperature, b, r);
        if (row.has_nan) {
            for (Index i = 0; i < row.picks; ++i)
                cpu::fill_nan_row(&scores(b, r, i), 1, row.real ? row.real + row.index[i] : nullptr);
            return;
        }
        for (Index i = 0; i < row.picks; ++i)
            scores(b, r, i) = static_cast<T>(static_cast<double>(row.exponential[row.index[i]]) /
                                             std::max(row.below[i], cumulative_softmax_floor));
    });
}

template <typename T>
void cumulative_softmax_vjp_kernel(const Cpu& policy, TokensView<T> d_logits, TokensView<const T> d_scores,
                                   TokensView<const T> logits, TokensView<const TokenIndex> indices, Mask mask,
                                   double temperature) {
    const Index routes = logits.extent(1);
    cpu::check_indices(indices, logits.extent(2));
    parallel_for(policy, logits.extent(0) * routes, [&](Index task) {
        const Index b = task / routes, r = task % routes;
        const cpu::CumulativeRow<T> row(logits, indices, mask, temperature, b, r);
        T* const ds = d_logits[b][r].data();
        if (row.has_nan) return cpu::fill_nan_row(ds, row.length, row.real);
        double all = 0;  // Σ c_j over every pick
        const auto pick_gradient = [&](Index i, double e) {
            if (e == 0) return 0.0;  // a masked token, whose gradient may be anything
            const double g = static_cast<double>(d_scores(b, r, i)), sum = row.below[i];
            if (sum >= cumulative_softmax_floor) all -= g * e / (sum * sum);
            return e / temperature * (g / std::max(sum, cumulative_softmax_floor) + all);
        };
        double* const pick_gradients = cpu::thread_scratch<double, struct PickGradients>(row.picks);
        for (Index i = 0; i < row.picks; ++i)
            pick_gradients[i] = pick_gradient(i, static_cast<double>(row.exponential[row.index[i]]));
        for (Index i = 0; i < row.length; ++i)
            ds[i] = row.exponential[i] == T(0)
                        ? T(0)
                        : static_cast<T>(static_cast<double>(row.exponential[i]) / temperature * all);
        for (Index i = 0; i < row.picks; ++i) ds[row.index[i]] = static_cast<T>(pick_gradients[i]);
    });
}

}  // namespace colt5
