// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cpu/local_window.hpp>
#include <colt5/op/relative_position_bias.hpp>

/// Local attention: the relative position bias of one head, and its gradient.
namespace colt5::cpu {

/// The bias of one head by i − j, the position of the query minus that of the key, which grows along the lanes of a
/// batch of queries. There are `margin` entries more on each side than reach asks for: tiles are whole blocks.
template <typename T>
class LocalBias {
public:
    using Tile = LocalTile<T>;
    static constexpr Index margin = Tile::queries + block_rows;

    LocalBias(const RelativePositionBias<T>& bias, Index head, Index reach_) : reach(reach_) {
        T* const to = thread_scratch<T, struct Entries>(entries());
        const T* const from = bias.by_distance[head].data();
        const Index span = bias.by_distance.extent(1) / 2;
        for (Index i = 0; i < entries(); ++i) to[i] = from[span + std::clamp(reach + margin - i, -span, span)];
        of_distance_ = to;
    }

    /// That of a batch of queries and one key, of which the position of the first query is `distance` more than that of
    /// the key.
    Batch<T> at(Index distance) const { return load(of_distance_ + reach + margin + distance); }

    Index entries() const { return 2 * (reach + margin) + 1; }
    const Index reach;

private:
    const T* of_distance_;
};

/// Sums d_scores over a segment's tiles of queries entry by entry, and at the segment's end along the diagonals. Entry
/// (row, i) is that of query i of a tile and the key at row − before tokens after the tile's first query.
template <typename T>
class LocalBiasGradient {
public:
    using Tile = LocalTile<T>;

    explicit LocalBiasGradient(const LocalBias<T>& bias)
        : bias_(bias),
          before_(bias.reach + block_rows),
          rows_(before_ + Tile::queries + bias.reach + block_rows),
          sums_(thread_scratch<T, struct LocalBiasSums>(rows_ * Tile::queries)) {
        std::fill_n(sums_, rows_ * Tile::queries, T(0));
    }

    /// Adds those of a batch of queries from query i of its tile on and the key at `distance` tokens after the tile's
    /// first query.
    void add(Index i, Index distance, const Batch<T>& d_scores) const {
        T* const to = sums_ + (before_ + distance) * Tile::queries + i;
        store(to, load(to) + d_scores);
    }
    /// Assigns the gradient of the bias by distance (2 · span + 1).
    void store_by_distance(T* by_distance, Index span) const {
        constexpr Index margin = LocalBias<T>::margin;
        const Index center = bias_.reach + margin;
        T* const diagonals = thread_scratch<T, struct Diagonals>(bias_.entries() + Tile::queries);
        std::fill_n(diagonals, bias_.entries() + Tile::queries, T(0));
        for (Index row = 0; row < rows_; ++row)
            for (Index i = 0; i < Tile::queries; i += lanes<T>) {
                T* const to = diagonals + center + before_ - row + i;
                store(to, load(to) + load(sums_ + row * Tile::queries + i));
            }
        std::fill_n(by_distance, 2 * span + 1, T(0));
        for (Index r = -bias_.reach; r <= bias_.reach; ++r)
            by_distance[span + std::clamp(r, -span, span)] += diagonals[center - r];
    }

private:
    const LocalBias<T>& bias_;
    Index before_, rows_;
    T* sums_;
};

inline NoBias local_bias(NoBias, Index, Index) {
    return {};
}
template <typename T>
LocalBias<T> local_bias(const RelativePositionBias<T>& bias, Index head, Index reach) {
    return {bias, head, reach};
}
inline NoBias local_bias_gradient(NoBias) {
    return {};
}
template <typename T>
LocalBiasGradient<T> local_bias_gradient(const LocalBias<T>& bias) {
    return LocalBiasGradient<T>(bias);
}

}  // namespace colt5::cpu
