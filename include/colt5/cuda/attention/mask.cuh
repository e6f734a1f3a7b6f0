// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include <colt5/cuda/attention/problem.cuh>
#include <colt5/cuda/tile_product.cuh>

/// Which (query, key) pairs attention hides: those out of reach, keys behind those that a query may see (HeadBias),
/// and masked keys.
namespace colt5::cuda {

/// How many positions before and after its own a row attends to: a query to keys, or for the key gradient a key to
/// queries, which is the other way round.
struct Reach {
    int before, after;

    template <typename T>
    __device__ static Reach of_query(const Attention<T>& a) {
        return {a.reach, a.ahead};
    }
    template <typename T>
    __device__ static Reach of_key(const Attention<T>& a) {
        return {a.ahead, a.reach};
    }
    /// Whether 16 rows from position `rows` on all attend to the 16 columns from `columns` on.
    __device__ bool has_all(int rows, int columns) const {
        const int distance = columns - rows;
        return distance >= 15 - before && distance <= after - 15;
    }
    /// Whether a row does not attend to the column at this distance after it.
    __device__ bool excludes(int distance) const {
        return static_cast<unsigned>(distance + before) > static_cast<unsigned>(before + after);
    }
};

/// The key range of a tile: the streamed rows of [0, limit) that are in reach of a row in [first, first + rows),
/// rounded down to begin at a multiple of 16. For the key gradient, which streams queries, it is a range of queries.
struct KeyRange {
    int begin, end;

    __device__ KeyRange(int first, int rows, Reach reach, int limit)
        : begin(::max(0, first - reach.before) / 16 * 16), end(::min(limit, first + rows + reach.after)) {}
};

/// One bit for each row of a stage: whether the row is a key that is not masked.
template <int rows>
struct Visibility {
    std::uint32_t words[(rows + 31) / 32];

    /// Sets the bit of `row`. All lanes of a warp call it, with 32 consecutive rows.
    __device__ void set(int row, bool visible) {
        const std::uint32_t word = __ballot_sync(0xffffffffu, visible);
        if (row % 32 == 0) words[row / 32] = word;
    }
    /// The bits of the 16 rows from `row` on, a multiple of 16.
    __device__ std::uint32_t of_group(int row) const { return words[row / 32] >> row % 32 & 0xffffu; }
};
inline constexpr std::uint32_t whole_group = 0xffffu;

/// What the rows of a 16 × 16 accumulator are; its columns are the other ones.
enum class RowsAre { queries, keys };

/// The mask of 16 rows and 16 streamed columns. Functions `hide(j, e)` are called for hidden pairs of the accumulator.
template <RowsAre rows_are, typename Bias>
struct GroupMask {
    const Reach& reach;
    const Bias& bias;           // HeadBias
    int row, position, column;  // the first row, its position among the columns, and the first column

    /// Pairs out of reach, and keys behind those that a query may see.
    template <typename Hide>
    __device__ void hide_by_position(const Hide& hide) const {
        if (!reach.has_all(position, column))
            for_each_entry([&](int j, int e, int r, int c) {
                if (reach.excludes(column + c - position - r)) hide(j, e);
            });
        if constexpr (rows_are == RowsAre::queries)
            bias.for_each_hidden_of_queries(row, column, hide);
        else
            bias.for_each_hidden_of_keys(row, column, hide);
    }
    /// Masked keys, where columns are keys: those without a bit in `visible`.
    template <typename Hide>
    __device__ static void hide_masked(std::uint32_t visible, const Hide& hide) {
        if (visible != whole_group)
            for_each_entry([&](int j, int e, int, int c) {
                if ((visible >> c & 1) == 0) hide(j, e);
            });
    }
};

}  // namespace colt5::cuda
