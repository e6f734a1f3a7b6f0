// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include <colt5/cpu/causal_top_k.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/op/causal_top_k_next.hpp>

namespace colt5 {

template <typename T>
void causal_top_k_next_kernel(const Cpu& policy, const CausalTopK& how, NextCausalPicks<T, Cpu>* next,
                              TokensView<T> history, TokensView<T> block, TokensView<std::int64_t> progress,
                              TokensView<const T> logits, Mask mask) {
    using Rank = LogitRank<T>;
    const Index batch = next->indices.extent(0), routes = next->indices.extent(1), width = next->indices.extent(2);
    const Index rows = batch * routes, length = logits.extent(2), size = how.block_size;
    VectorTensor<Index, Cpu> taken(policy, {rows});
    parallel_for(policy, rows, [&](Index row) {
        const T* const s = logits.data() + row * length;
        T *const of_history = history.data() + row * size, *const of_block = block.data() + row * 2;
        TokenIndex *const indices = next->indices.data() + row * width, *const positions =
                                                                            next->positions.data() + row * width;
        T* const scores = next->scores.data() + row * width;
        bool* const live = next->live.data() + row * width;
        auto at = CausalProgress::load(progress.data() + row * CausalProgress::size);
        const Index before = at.length;
        const bool* const real = mask ? mask[row / routes].data() : nullptr;
        const Index count = real ? std::count(real, real + length, true) : length;
        Index chosen = 0;
        for (Index i = 0; i < count; ++i) {
            if (at.begins_block(size)) {
                T* const sorted = cpu::thread_scratch<T, struct NextHistory>(size);
                const Index known = std::min(Index{at.length}, size);
                std::copy_n(of_history, known, sorted);
                const cpu::CausalPrice<T> of_tokens(how, sorted, known);
                of_block[0] = of_tokens.threshold;
                of_block[1] = of_tokens.price;
                at.begin_block(how);
            }
            of_history[at.length % size] = s[i];
            const bool is_chosen = at.left > 0 && chosen < width && Rank::of(s[i]) <= Rank::of(of_block[0]);
            if (is_chosen) {
                indices[chosen] = static_cast<TokenIndex>(i);
                scores[chosen] = how.value_of(ScoreAtPrice<T>(s[i], of_block[1], how.eps).score);
                live[chosen++] = true;
            }
            at.advance(how, 1, is_chosen ? 1 : 0);
        }
        taken.data()[row] = chosen;
        for (Index j = chosen; j < width; ++j) {
            indices[j] = unchosen_token(indices, chosen, j - chosen);
            scores[j] = T(0);
            live[j] = false;
        }
        for (Index j = 0; j < width; ++j) positions[j] = static_cast<TokenIndex>(before + indices[j]);
        at.store(progress.data() + row * CausalProgress::size);
    });
    const Index used = rows > 0 ? *std::max_element(taken.data(), taken.data() + rows) : 0;
    if (used == width) return;
    const auto narrow = [&](auto& picks) {
        using Picks = std::remove_reference_t<decltype(picks)>;
        Picks to(policy, {batch, routes, used});
        for (Index row = 0; row < rows; ++row) std::copy_n(picks.data() + row * width, used, to.data() + row * used);
        picks = std::move(to);
    };
    narrow(next->indices);
    narrow(next->positions);
    narrow(next->scores);
    narrow(next->live);
}

}  // namespace colt5
