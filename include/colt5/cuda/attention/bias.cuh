// SPDX-License-Identifier: MIT
#pragma once

#include <type_traits>

#include <colt5/cuda/attention/mask.cuh>
#include <colt5/op/relative_position_bias.hpp>

/// The bias of the logits of attention by the positions of query and key, in the kernels. Kernels
/// take NoBias, WindowBias or PositionBias. The bias, divided by the scale, is added to the products q·k; everything
/// after that is the same as without a bias. LimitedBias wraps one of these three, and says in addition which keys a
/// query sees.
namespace colt5::cuda {

/// Of local attention: by the distance within the sequence.
template <typename Sum>
struct WindowBias {
    const Sum* by_distance;  // (heads, 2 · span + 1)
    int span;
    Sum inverse_scale;
    Sum* parts = nullptr;  // of the gradient, (batch, heads, parts, part_entries(span)); one of each warp
};
/// Of dense attention: by positions that come with queries and keys.
template <typename Sum>
struct PositionBias {
    const Sum* by_distance;  // (heads, 2 · span + 1)
    int span;
    Sum inverse_scale;
    const TokenIndex* query_positions;  // (batch, query_routes, queries), or null
    const TokenIndex* key_positions;    // (batch, routes, keys − null_keys), or null
    int null_keys, query_routes;
    // Of the gradient: the bucket of each distance, and (batch, heads, parts, buckets · warp_size), one part of each
    // warp.
    const TokenIndex* bucket_of = nullptr;
    int buckets = 0;
    Sum* parts = nullptr;
};

/// Of dense attention: query i sees the keys before counts[i] alone. Their logits get `inner`.
template <typename Inner>
struct LimitedBias {
    Inner inner;
    const TokenIndex* counts;  // (batch, groups, queries), or null: all keys
    int groups;
};

/// The bias of the block's head:
///
///     add_to_queries(products, query, key)  of 16 queries (rows) and 16 keys (columns), from these on
///     add_to_keys(products, key, query)     of 16 keys (rows) and 16 queries (columns)
///     of_query(i), of_key(j)                f(product, j) and f(product, i), of one pair
///
/// and which pairs of the head are hidden: none, by SeesAll, except with LimitedBias:
///
///     hides                                 compile-time constant: whether any pair may be hidden
///     keys_seen(i, keys)                    how many of `keys` keys query i sees; they are the first ones
///     most_keys_seen(i, count, keys, stage)
///         the largest keys_seen of `count` queries from i on, rounded up to a multiple of `stage`, so perhaps more
///         than `keys`; without counts, `keys`. Because it is rounded up, the order of a query's sums depends only on
///         the keys that it sees, not on what the other queries of its tile see. All lanes call it
///     is_hidden(i, j)                       whether query i does not see key j
///     clip(range, j)
///         leaves out queries at both ends that see no key from j on. All lanes call it
///     for_each_hidden_of_queries(query, key, run), for_each_hidden_of_keys(key, query, run)
///         run(j, e) for the hidden pairs of 16 queries and 16 keys
template <typename T, typename Bias>
struct HeadBias;

struct SeesAll {
    static constexpr bool hides = false;
    __device__ int keys_seen(int, int keys) const { return keys; }
    __device__ int most_keys_seen(int, int, int keys, int) const { return keys; }
    __device__ bool is_hidden(int, int) const { return false; }
    __device__ void clip(KeyRange&, int) const {}
    template <typename Run>
    __device__ void for_each_hidden_of_queries(int, int, const Run&) const {}
    template <typename Run>
    __device__ void for_each_hidden_of_keys(int, int, const Run&) const {}
};

/// The pairs of one query, or of one key.
template <typename Bias>
struct QueryBias {
    Bias bias;
    int query;
    template <typename Sum>
    __device__ Sum operator()(Sum product, int key) const {
        return product + bias.of_pair(query, key);
    }
};
template <typename Bias>
struct KeyBias {
    Bias bias;
    int key;
    template <typename Sum>
    __device__ Sum operator()(Sum product, int query) const {
        return product + bias.of_pair(query, key);
    }
    __device__ bool hides(int query) const { return bias.is_hidden(query, key); }
};
struct NoRowBias {
    __device__ bool hides(int) const { return false; }
    template <typename Sum>
    __device__ Sum operator()(Sum product, int) const {
        return product;
    }
};

template <typename T>
struct HeadBias<T, NoBias> : SeesAll {
    using Sum = accumulate_t<T>;
    __device__ HeadBias(const Attention<T>&, const AttentionBlock<T>&, NoBias) {}
    __device__ void add_to_queries(Sum (&)[2][4], int, int) const {}
    __device__ void add_to_keys(Sum (&)[2][4], int, int) const {}
    __device__ NoRowBias of_query(int) const { return {}; }
    __device__ NoRowBias of_key(int) const { return {}; }
};

template <typename T>
struct HeadBias<T, WindowBias<accumulate_t<T>>> : SeesAll {
    using Sum = accumulate_t<T>;
    const Sum* center;
    int span, first;
    Sum inverse_scale;

    __device__ HeadBias(const Attention<T>& a, const AttentionBlock<T>& block, const WindowBias<Sum>& bias)
        : center(bias.by_distance + static_cast<Index>(block.h) * (2 * bias.span + 1) + bias.span),
          span(bias.span),
          first(a.first),
          inverse_scale(bias.inverse_scale) {}
    /// Of a key that is `distance` tokens after the query.
    __device__ Sum at(int distance) const { return __ldg(center + ::max(-span, ::min(span, distance))); }
    __device__ void add_to_queries(Sum (&products)[2][4], int query, int key) const {
        add<1>(products, key - first - query);
    }
    __device__ void add_to_keys(Sum (&products)[2][4], int key, int query) const {
        add<-1>(products, first + query - key);
    }
    __device__ Sum of_pair(int query, int key) const { return at(key - first - query) * inverse_scale; }
    __device__ QueryBias<HeadBias> of_query(int query) const { return {*this, query}; }
    __device__ KeyBias<HeadBias> of_key(int key) const { return {*this, key}; }

private:
    /// `offset`: of the first column from the first row. Columns are keys with sign 1, queries with sign −1. A lane's
    /// eight entries lie on six diagonals.
    template <int sign>
    __device__ void add(Sum (&products)[2][4], int offset) const {
        const int of_lane = offset + accumulator_column() - accumulator_row();
        Sum of_diagonal[3][2];
#pragma unroll
        for (int block = 0; block < 3; ++block)
#pragma unroll
            for (int e = 0; e < 2; ++e) of_diagonal[block][e] = at(sign * (of_lane + 8 * (block - 1) + e));
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) products[j][e] += of_diagonal[1 + j - e / 2][e % 2] * inverse_scale;
    }
};

template <typename T>
struct HeadBias<T, PositionBias<accumulate_t<T>>> : SeesAll {
    using Sum = accumulate_t<T>;
    const Sum* by_distance;
    int span, null_keys, queries, keys;
    Sum inverse_scale;
    const TokenIndex *query_positions, *key_positions;

    __device__ HeadBias(const Attention<T>& a, const AttentionBlock<T>& block, const PositionBias<Sum>& bias)
        : by_distance(bias.by_distance + static_cast<Index>(block.h) * (2 * bias.span + 1)),
          span(bias.span),
          null_keys(bias.null_keys),
          queries(a.queries),
          keys(a.keys),
          inverse_scale(bias.inverse_scale),
          query_positions(bias.query_positions == nullptr
                              ? nullptr
                              : bias.query_positions + (static_cast<Index>(block.b) * bias.query_routes +
                                                        static_cast<Index>(block.h) * bias.query_routes / a.heads()) *
                                                           a.queries),
          key_positions(bias.key_positions == nullptr
                            ? nullptr
                            : bias.key_positions +
                                  (static_cast<Index>(block.b) * a.routes + block.route) * (a.keys - bias.null_keys)) {}
    /// The positions of query i and of key j; −1 of a null key. An index beyond the end reads no memory, and what is
    /// returned for it does not matter.
    __device__ int query_position(int i) const {
        return query_positions == nullptr || i >= queries ? i : __ldg(query_positions + i);
    }
    __device__ int key_position(int j) const {
        const int at = j - null_keys;
        if (at < 0) return -1;
        return key_positions == nullptr || j >= keys ? at : __ldg(key_positions + at);
    }
    /// The entry of by_distance, unless the key has no position.
    __device__ int entry(int query, int key) const { return ::max(-span, ::min(span, key - query)) + span; }
    __device__ Sum at(int query, int key) const {
        return key < 0 ? Sum(0) : __ldg(by_distance + entry(query, key)) * inverse_scale;
    }
    __device__ void add_to_queries(Sum (&products)[2][4], int query, int key) const {
        const int row = query + accumulator_row(), rows[2] = {query_position(row), query_position(row + 8)};
        for_each_entry(
            [&](int j, int e, int, int column) { products[j][e] += at(rows[e / 2], key_position(key + column)); });
    }
    __device__ void add_to_keys(Sum (&products)[2][4], int key, int query) const {
        const int row = key + accumulator_row(), rows[2] = {key_position(row), key_position(row + 8)};
        for_each_entry(
            [&](int j, int e, int, int column) { products[j][e] += at(query_position(query + column), rows[e / 2]); });
    }
    __device__ Sum of_pair(int query, int key) const { return at(query_position(query), key_position(key)); }
    __device__ QueryBias<HeadBias> of_query(int query) const { return {*this, query}; }
    __device__ KeyBias<HeadBias> of_key(int key) const { return {*this, key}; }
};

template <typename T, typename Inner>
struct HeadBias<T, LimitedBias<Inner>> : HeadBias<T, Inner> {
    static constexpr bool hides = true;
    const TokenIndex* counts;  // of the head's queries, or null
    int all_queries;

    __device__ HeadBias(const Attention<T>& a, const AttentionBlock<T>& block, const LimitedBias<Inner>& bias)
        : HeadBias<T, Inner>(a, block, bias.inner),
          counts(bias.counts == nullptr ? nullptr
                                        : bias.counts + (static_cast<Index>(block.b) * bias.groups +
                                                         static_cast<Index>(block.h) * bias.groups / a.heads()) *
                                                            a.queries),
          all_queries(a.queries) {}
    /// With counts, queries beyond the end see nothing.
    __device__ int count(int query) const {
        if (counts == nullptr) return Attention<T>::everything;
        return query < all_queries ? ::max(0, __ldg(counts + query)) : 0;
    }
    __device__ int keys_seen(int query, int keys) const { return ::min(keys, count(query)); }
    __device__ int most_keys_seen(int query, int queries, int keys, int stage) const {
        if (counts == nullptr) return keys;
        int most = 0;
        for (int i = lane_id(); i < queries; i += warp_size) most = ::max(most, count(query + i));
        return (__reduce_max_sync(0xffffffffu, ::min(most, keys)) + stage - 1) / stage * stage;
    }
    __device__ bool is_hidden(int query, int key) const { return key >= count(query); }
    __device__ void clip(KeyRange& range, int key) const {
        if (counts == nullptr) return;
        int begin = range.end, end = 0;
#pragma unroll 4
        for (int i = range.begin + lane_id(); i < range.end; i += warp_size)
            if (!is_hidden(i, key)) {
                begin = ::min(begin, i);
                end = i + 1;
            }
        end = __reduce_max_sync(0xffffffffu, end);
        range.begin = end == 0 ? 0 : __reduce_min_sync(0xffffffffu, begin) / 16 * 16;
        range.end = end;
    }
    __device__ auto of_pair(int query, int key) const {
        if constexpr (std::is_same_v<Inner, NoBias>)
            return 0;
        else
            return HeadBias<T, Inner>::of_pair(query, key);
    }
    __device__ KeyBias<HeadBias> of_key(int key) const {
        return {*this, key};
    }
    template <typename Run>
    __device__ void for_each_hidden_of_queries(int query, int key, const Run& run) const {
        const int row = query + accumulator_row(), seen[2] = {count(row) - key, count(row + 8) - key};
        if (::min(seen[0], seen[1]) >= 16) return;
        for_each_entry([&](int j, int e, int, int column) {
            if (column >= seen[e / 2]) run(j, e);
        });
    }
    template <typename Run>
    __device__ void for_each_hidden_of_keys(int key, int query, const Run& run) const {
        for_each_entry([&](int j, int e, int row, int column) {
            if (is_hidden(query + column, key + row)) run(j, e);
        });
    }
};

}  // namespace colt5::cuda
