// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <colt5/core/tensor.hpp>
#include <colt5/op/local_attention.hpp>

/// Decoding: sequences are computed a few tokens at a time.
namespace colt5 {

/// What a call of decode gets: the next tokens of each sequence of a cache.
template <Policy P>
struct NextTokens {
    std::vector<Index> past, counts;         ///< of each sequence: tokens that it has, and new ones
    Tensor<bool, P, dynamic, dynamic> real;  ///< (b, m): true for new ones; empty: all are new

    Index batch() const { return static_cast<Index>(past.size()); }
    Index past_of(Index b) const { return past[static_cast<std::size_t>(b)]; }
    Index count_of(Index b) const { return counts[static_cast<std::size_t>(b)]; }
    Mask mask() const { return real ? Mask(real) : Mask(); }

    /// Calls f(first, number) for each run of consecutive sequences with the same `past` and the same count.
    template <typename F>
    void each_run(const F& f) const {
        for (Index b = 0, number = 1; b < batch(); b += number, number = 1) {
            while (b + number < batch() && past_of(b + number) == past_of(b) && count_of(b + number) == count_of(b))
                ++number;
            f(b, number);
        }
    }
};

/// How attention reads the rows of a cache of keys and values. Another module's rows may be as long, so files hold
/// these numbers, too, and load_cache compares them.
struct KeyFormat {
    std::uint64_t heads = 0, dim_head = 0;
    std::uint64_t rotary_emb = 0;  // 1 if the keys are rotated

    KeyFormat() = default;
    KeyFormat(Index heads_, Index dim_head_, bool rotates)
        : heads(static_cast<std::uint64_t>(heads_)),
          dim_head(static_cast<std::uint64_t>(dim_head_)),
          rotary_emb(rotates ? 1 : 0) {}

    /// Calls f.state(prefix + name, number...) for each, if f has it.
    template <typename F, typename... Formats>
    static void each_number(F&& f, const std::string& prefix, Formats&... formats) {
        if constexpr (requires { f.state(prefix, formats.heads...); }) {
            f.state(prefix + "heads", formats.heads...);
            f.state(prefix + "dim_head", formats.dim_head...);
            f.state(prefix + "rotary_emb", formats.rotary_emb...);
        }
    }
};

/// Which keys and values of local attention a cache keeps of a sequence of `past` tokens: those from token origin(past)
/// on. It keeps up to grid.queries + step() tokens more than the next query sees, so that the origin can be a multiple
/// of grid.keys, as LocalGrid asks, and that the cache moves its rows only once every step() tokens.
struct DecodeWindow {
    Index reach;  ///< tokens that a query sees before its own
    LocalGrid grid;

    /// For causal attention in sequences of up to max_length tokens.
    template <typename P, typename T>
    static constexpr DecodeWindow of(const LocalAttention& attention, Index max_length) {
        return {std::min(attention.reach, max_length), LocalGridOf<P, T>::of(attention)};
    }

    constexpr Index step() const { return round_up(std::max(Index{64}, grid.keys), grid.keys); }
    /// The first token of the tile of queries that holds the next query.
    constexpr Index first_query(Index past) const { return past / grid.queries * grid.queries; }
    constexpr Index origin(Index past) const { return std::max(Index{0}, first_query(past) - reach) / step() * step(); }
    /// The most tokens that it keeps: reach + grid.queries + step(), or max_length if that is less.
    constexpr Index rows(Index max_length) const { return std::min(max_length, reach + grid.queries + step()); }
};

}  // namespace colt5
