// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include <colt5/cpu/parallel.hpp>
#include <colt5/op/top_k.hpp>

namespace colt5 {

namespace cpu {

/// A rank and the index of its logit, whose order is the order of choice: smaller rank, then lower index. For float it
/// is one number, which is sorted without branches; for double a pair.
template <typename T>
struct RankKey;

template <>
struct RankKey<float> {
    using type = std::uint64_t;
    static type make(std::uint32_t rank, Index index) {
        return (std::uint64_t{rank} << 32) | static_cast<std::uint32_t>(index);
    }
    static TokenIndex index(type key) { return static_cast<TokenIndex>(key & 0xFFFFFFFFu); }
};

template <>
struct RankKey<double> {
    struct type {
        std::uint64_t rank;
        TokenIndex index;
        friend bool operator<(const type& a, const type& b) {
            return a.rank != b.rank ? a.rank < b.rank : a.index < b.index;
        }
    };
    static type make(std::uint64_t rank, Index index) { return {rank, static_cast<TokenIndex>(index)}; }
    static TokenIndex index(const type& key) { return key.index; }
};

}  // namespace cpu

template <typename T>
void top_k_kernel(const Cpu& policy, TokensView<TokenIndex> indices, TokensView<const T> logits, Mask mask) {
    using Key = cpu::RankKey<T>;
    using Rank = LogitRank<T>;
    const Index batch = logits.extent(0), routes = logits.extent(1), length = logits.extent(2);
    const Index k = indices.extent(2);
    parallel_for(policy, batch * routes, [&](Index row) {
        const Index b = row / routes, r = row % routes;
        auto* const keys = cpu::thread_scratch<typename Key::type, struct RankKeys>(length);
        for (Index i = 0; i < length; ++i) {
            const auto rank = Rank::of(logits(b, r, i));
            keys[i] = Key::make(!mask || mask(b, i) ? rank : Rank::masked, i);
        }
        if (k < length) std::nth_element(keys, keys + k, keys + length);
        std::sort(keys, keys + k);
        for (Index i = 0; i < k; ++i) indices(b, r, i) = Key::index(keys[i]);
    });
}

}  // namespace colt5
