// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>

#include <colt5/cpu/gather.hpp>
#include <colt5/op/pick.hpp>

namespace colt5 {

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

}  // namespace colt5
