// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention_pipeline.cuh>
#include <colt5/cuda/relative_position_bias.cuh>

/// The bias of the logits of attention by the positions of query and key, in the kernels, and its gradient. Kernels
/// take NoBias, WindowBias or PositionBias; a bias divided by the scale is added to the products q·k, so that all that
/// follows is as without. LimitedBias wraps one of these three, and says in addition which keys a query sees.
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

/// The warp's part of the gradient.
template <typename T>
__device__ Index part_of_warp(const Attention<T>& a, const AttentionBlock<T>& block, int warps) {
    const auto heads = static_cast<unsigned>(a.heads());
    const Index parts = static_cast<Index>(gridDim.x / heads) * warps;
    return (static_cast<Index>(block.b) * a.heads() + block.h) * parts +
           static_cast<Index>(blockIdx.x / heads) * warps + static_cast<int>(threadIdx.x) / warp_size;
}

/// The bias of the block's head:
///
///     add_to_queries(products, query, key)  of 16 queries (rows) and 16 keys (columns), from these on
///     add_to_keys(products, key, query)     of 16 keys (rows) and 16 queries (columns)
///     of_query(i), of_key(j)                f(product, j) and f(product, i), of one pair
///
/// and which pairs of the head are hidden, from SeesAll or as LimitedBias says:
///
///     hides                                 constant: some may be
///     keys_seen(i, keys)                    of `keys` keys, those before this number are what query i sees
///     most_keys_seen(i, count, keys, stage)
///         the largest keys_seen of `count` queries from i on, rounded up to a multiple of `stage`, so perhaps more
///         than `keys`; without counts, `keys`. Then the order of a query's sums depends only on the keys that it sees,
///         not on what the other queries of its tile see. All lanes call it
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

/// The gradient of the bias, which a warp of the kernel of d_k and d_v sums over its keys:
///
///     add(d_s, key, query)  of 16 keys (rows) and 16 queries (columns), from these on
///     end()                 writes the warp's part
///
/// `shared_bytes_of_block` is the shared memory that a block needs for it, beyond that of the kernel; the constructor
/// gets a pointer to it. `is_present` says whether there is such a gradient.
template <typename Shape, typename Bias>
class BiasGradient;

template <typename Shape>
class BiasGradient<Shape, NoBias> {
public:
    using Sum = typename Shape::Sum;
    using T = typename Shape::T;
    static constexpr int shared_bytes_of_block = 0;
    static constexpr bool is_present = false;
    __device__ BiasGradient(const Attention<T>&, const AttentionBlock<T>&, NoBias, unsigned char*) {}
    __device__ void add(const Sum (&)[2][4], int, int) {}
    __device__ void end() {}
};

/// Sums along diagonals, which are distances: the lanes write their entries to `scratch`, and each lane sums one
/// diagonal of the group and adds it to the warp's sums by distance.
template <typename Shape>
class BiasGradient<Shape, WindowBias<typename Shape::Sum>> {
public:
    using Sum = typename Shape::Sum;
    using T = typename Shape::T;
    static constexpr bool is_present = true;
    /// Of scratch: 8 rows, each of 24 entries between 8 zeros on both sides.
    static constexpr int pitch = 40, scratch_entries = 8 * pitch;
    /// The sums by distance of a sliding window stay in shared memory, unless the bias goes beyond the window. Scratch
    /// does, too, if there is room.
    static constexpr int row_entries = Shape::slides ? 2 * sliding_rows + 1 : 0;
    static constexpr int bytes = Shape::warps * (scratch_entries + row_entries) * static_cast<int>(sizeof(Sum));
    static constexpr bool fits = static_cast<int>(sizeof(typename Shape::Shared)) + bytes <= shared_bytes;
    static_assert(fits || !Shape::slides);
    static constexpr int shared_bytes_of_block = fits ? bytes : 0;
    /// Of a warp's part in global memory: sums by distance, then scratch if it is not shared.
    __host__ __device__ static int part_entries(int span) { return 2 * span + 1 + (fits ? 0 : scratch_entries + 1); }

    __device__ BiasGradient(const Attention<T>& a, const AttentionBlock<T>& block, const WindowBias<Sum>& bias,
                            unsigned char* memory)
        : span_(bias.span),
          first_(a.first),
          part_(bias.parts + part_of_warp(a, block, Shape::warps) * part_entries(bias.span)) {
        const int warp = static_cast<int>(threadIdx.x) / warp_size;
        if constexpr (fits)
            scratch_ = reinterpret_cast<Sum*>(memory) + warp * scratch_entries;
        else
            scratch_ = part_ + (2 * span_ + 2);  // `write` stores pairs: this and part_entries are even
        if (Shape::slides && span_ <= sliding_rows)
            sums_ = reinterpret_cast<Sum*>(memory) + Shape::warps * scratch_entries + warp * row_entries;
        else
            sums_ = part_;
        for (int i = lane_id(); i < scratch_entries; i += warp_size) scratch_[i] = 0;
        for (int i = lane_id(); i < 2 * span_ + 1; i += warp_size) sums_[i] = 0;
    }
    __device__ void add(const Sum (&d_s)[2][4], int key, int query) {
        const int lane = lane_id();
        __syncwarp();  // what the call before this one has read
        Sum* const to = scratch_ + accumulator_row() * pitch + 8 + accumulator_column();
        write(to, d_s[0][2], d_s[0][3]);
        write(to + 8, d_s[0][0] + d_s[1][2], d_s[0][1] + d_s[1][3]);
        write(to + 16, d_s[1][0], d_s[1][1]);
        __syncwarp();
        // Lane l sums the entries whose column is l − 15 after their row.
        Sum sum = 0;
#pragma unroll
        for (int row = 0; row < 8; ++row) sum += scratch_[row * pitch + row + lane + 1];
        const int distance = key - first_ - query - (lane - 15);
        if (distance < -span_)
            behind_ += sum;
        else if (distance > span_)
            ahead_ += sum;
        else if (lane < 31)
            sums_[span_ + distance] += sum;
    }
    __device__ void end() {
        behind_ = warp_sum(behind_);
        ahead_ = warp_sum(ahead_);
        __syncwarp();
        if (lane_id() == 0) {
            sums_[0] += behind_;
            sums_[2 * span_] += ahead_;
        }
        __syncwarp();
        if (Shape::slides && sums_ != part_)
            for (int i = lane_id(); i < 2 * span_ + 1; i += warp_size) part_[i] = sums_[i];
    }

private:
    __device__ static void write(Sum* to, Sum first, Sum second) {
        store_pack(to, Pack<Sum, 2>{{first, second}});
    }

    int span_, first_;
    Sum *part_, *scratch_, *sums_;
    Sum behind_ = 0, ahead_ = 0;  // of distances beyond ±span
};

/// Each lane sums its own entries by bucket, those at the largest distances in registers.
template <typename Shape>
class BiasGradient<Shape, PositionBias<typename Shape::Sum>> {
public:
    using Sum = typename Shape::Sum;
    using T = typename Shape::T;
    static constexpr int shared_bytes_of_block = 0;
    static constexpr bool is_present = true;

    __device__ BiasGradient(const Attention<T>& a, const AttentionBlock<T>& block, const PositionBias<Sum>& bias,
                            unsigned char*)
        : bias_(a, block, bias),
          bucket_of_(bias.bucket_of),
          buckets_(bias.buckets),
          sums_(bias.parts + part_of_warp(a, block, Shape::warps) * bias.buckets * warp_size + lane_id()) {
        for (int bucket = 0; bucket < buckets_; ++bucket) sums_[bucket * warp_size] = 0;
    }
    __device__ void add(const Sum (&d_s)[2][4], int key, int query) {
        const int row = key + accumulator_row();
        const int rows[2] = {bias_.key_position(row), bias_.key_position(row + 8)};
        for_each_entry([&](int j, int e, int, int column) {
            if (rows[e / 2] < 0) return;
            const int entry = bias_.entry(bias_.query_position(query + column), rows[e / 2]);
            if (entry == 0)
                behind_ += d_s[j][e];
            else if (entry == 2 * bias_.span)
                ahead_ += d_s[j][e];
            else
                sums_[__ldg(bucket_of_ + entry) * warp_size] += d_s[j][e];
        });
    }
    __device__ void end() {
        sums_[bucket_of_[0] * warp_size] += behind_;
        sums_[bucket_of_[2 * bias_.span] * warp_size] += ahead_;
    }

private:
    HeadBias<T, PositionBias<Sum>> bias_;
    const TokenIndex* bucket_of_;
    int buckets_;
    Sum* sums_;
    Sum behind_ = 0, ahead_ = 0;
};

/// Hidden pairs have d_s = 0.
template <typename Shape, typename Inner>
class BiasGradient<Shape, LimitedBias<Inner>> : public BiasGradient<Shape, Inner> {
public:
    using T = typename Shape::T;
    __device__ BiasGradient(const Attention<T>& a, const AttentionBlock<T>& block, const LimitedBias<Inner>& bias,
                            unsigned char* memory)
        : BiasGradient<Shape, Inner>(a, block, bias.inner, memory) {}
};

}  // namespace colt5::cuda
