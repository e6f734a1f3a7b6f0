// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <string>

#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/gather.hpp>

namespace colt5 {

namespace cpu {
template <typename Indices>
void check_indices(const Indices& indices, Index length) {
    for (Index i = 0; i < indices.size(); ++i) {
        const TokenIndex index = indices.data()[i];
        if (index < 0 || index >= length)
            expect_value(false, "indices", colt5::detail::concat({"in [0, ", std::to_string(length), ")"}), index);
    }
}
}  // namespace cpu

template <typename T>
void gather_kernel(const Cpu& policy, TokensView<T> out, TokensView<const T> x, MatrixView<const TokenIndex> indices) {
    const Index batch = indices.extent(0), picks = indices.extent(1);
    cpu::check_indices(indices, x.extent(1));
    constexpr Index rows = 64;
    const Index chunks = divide_up(picks, rows);
    parallel_for(policy, batch * chunks, [&](Index task) {
        const Index b = task / chunks, first = task % chunks * rows;
        for (Index i = first; i < std::min(picks, first + rows); ++i)
            std::copy_n(x[b][indices(b, i)].data(), x.extent(2), out[b][i].data());
    });
}

template <std::same_as<bool> Bool>
void gather_mask_kernel(const Cpu&, TokensView<Bool> out, Mask mask, TokensView<const TokenIndex> indices) {
    cpu::check_indices(indices, mask.extent(1));
    for (Index b = 0; b < out.extent(0); ++b)
        for (Index i = 0; i < out.extent(1) * out.extent(2); ++i) out[b].data()[i] = mask(b, indices[b].data()[i]);
}

namespace cpu {

/// Calls body(i, weight) for the i-th pick of a sequence, the weight 1 / (number of picks of the same token).
template <typename Body>
void for_each_mean_weight(VectorView<const TokenIndex> indices, Body&& body) {
    const Index picks = indices.size();
    TokenIndex* const sorted = thread_scratch<TokenIndex, struct SortedPicks>(picks);
    std::copy_n(indices.data(), picks, sorted);
    std::sort(sorted, sorted + picks);
    for (Index i = 0; i < picks; ++i) {
        const auto [first, last] = std::equal_range(sorted, sorted + picks, indices(i));
        body(i, 1.0 / static_cast<double>(last - first));
    }
}

}  // namespace cpu

/// d_rows[b, i] *= 1 / (number of picks of the same token)
template <typename T>
void scatter_mean_weights_kernel(const Cpu& policy, TokensView<T> rows, MatrixView<const TokenIndex> indices) {
    parallel_for(policy, rows.extent(0), [&](Index b) {
        cpu::for_each_mean_weight(indices[b], [&](Index i, double weight) {
            cpu::scale_row(rows[b][i].data(), rows.extent(2), static_cast<T>(weight));
        });
    });
}

template <typename T>
void scatter_kernel(const Cpu& policy, Scatter how, TokensView<T> out, TokensView<const T> rows,
                    MatrixView<const TokenIndex> indices, MatrixView<const T> scale) {
    const Index batch = rows.extent(0), picks = rows.extent(1), dim = rows.extent(2);
    cpu::check_indices(indices, out.extent(1));
    constexpr Index columns = 128;  // tasks share out columns: rows that meet in one place stay in one task
    const Index blocks = divide_up(dim, columns);
    parallel_for(policy, batch * blocks, [&](Index task) {
        const Index b = task / blocks, first = task % blocks * columns, count = std::min(columns, dim - first);
        const auto put = [&](Index i, T weight) {
            T* const to = out[b][indices(b, i)].data() + first;
            const T* const from = rows[b][i].data() + first;
            if (scale) weight *= scale(b, i);
            if (weight == T(0) && how != Scatter::overwrite) return;
            if (how == Scatter::overwrite)
                std::transform(from, from + count, to, [weight](T value) { return weight * value; });
            else
                cpu::add_row(to, from, count, weight);
        };
        if (how == Scatter::mean)
            cpu::for_each_mean_weight(indices[b], [&](Index i, double weight) { put(i, static_cast<T>(weight)); });
        else
            for (Index i = 0; i < picks; ++i) put(i, T(1));
    });
}

template <typename T>
void pick_scores_kernel(const Cpu&, TokensView<T> out, TokensView<const T> scores, TokensView<const TokenIndex> indices,
                        Mask mask) {
    const Index batch = indices.extent(0), routes = indices.extent(1), picks = indices.extent(2);
    if (scores || mask) cpu::check_indices(indices, scores ? scores.extent(2) : mask.extent(1));
    for (Index b = 0; b < batch; ++b)
        for (Index r = 0; r < routes; ++r)
            for (Index i = 0; i < picks; ++i) {
                const TokenIndex token = indices(b, r, i);
                out(b, r, i) = mask && !mask(b, token) ? T(0) : scores ? scores(b, r, token) : T(1);
            }
}

template <typename T>
void straight_through_scores_kernel(const Cpu&, TokensView<T> scores, TokensView<const T> logits,
                                    TokensView<const TokenIndex> indices, Mask mask) {
    const Index batch = indices.extent(0), routes = indices.extent(1), picks = indices.extent(2);
    cpu::check_indices(indices, logits.extent(2));
    for (Index b = 0; b < batch; ++b)
        for (Index r = 0; r < routes; ++r)
            for (Index i = 0; i < picks; ++i) {
                const T first = logits(b, r, indices(b, r, 0));
                scores(b, r, i) = mask && !mask(b, indices(b, r, i)) ? T(0) : std::isnan(first) ? first : T(1);
            }
}

template <typename T>
void place_scores_kernel(const Cpu&, TokensView<T> d_scores, TokensView<const T> d_picked,
                         TokensView<const TokenIndex> indices, Mask mask) {
    const Index batch = indices.extent(0), routes = indices.extent(1), picks = indices.extent(2);
    cpu::check_indices(indices, d_scores.extent(2));
    std::fill_n(d_scores.data(), d_scores.size(), T(0));
    for (Index b = 0; b < batch; ++b)
        for (Index r = 0; r < routes; ++r)
            for (Index i = 0; i < picks; ++i) {
                const TokenIndex token = indices(b, r, i);
                if (!mask || mask(b, token)) d_scores(b, r, token) = d_picked(b, r, i);
            }
}

template <typename T>
void short_rows_kernel(const Cpu&, TokensView<T> values, TokensView<const TokenIndex> indices, Mask mask,
                       SampleCount k) {
    const Index batch = values.extent(0), routes = values.extent(1), columns = values.extent(2);
    if (indices) cpu::check_indices(indices, mask.extent(1));
    for (Index b = 0; b < batch; ++b) {
        const bool* const real = mask[b].data();
        if (std::count(real, real + mask.extent(1), true) > k(b)) continue;
        for (Index r = 0; r < routes; ++r)
            for (Index i = 0; i < columns; ++i) values(b, r, i) = indices && real[indices(b, r, i)] ? T(1) : T(0);
    }
}

}  // namespace colt5
