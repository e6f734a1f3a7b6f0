// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include <colt5/cpu/gemm.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/dense_attention.hpp>

namespace colt5::cpu {

/// What is added to the logits of one head, by the positions of query and key.
template <typename T>
struct AttentionHeadBias {
    const T* of_entry = nullptr;  // (2 · span + 2), the last one 0, for null keys; or null: no bias
    Index span = 0, null_keys = 0;
    const TokenIndex *query_positions = nullptr, *key_positions = nullptr;  // or null: their numbers

    Index entries() const { return 2 * span + 2; }
    /// to[j] = the entry of query i and key first + j
    void find_entries(Index i, Index first, Index keys, TokenIndex* to) const {
        const auto query = query_positions ? query_positions[i] : static_cast<TokenIndex>(i);
        const auto most = static_cast<TokenIndex>(span);
        Index j = 0;
        for (; j < keys && first + j < null_keys; ++j) to[j] = 2 * most + 1;
        const Index at = first - null_keys;  // of key 0 of `to` among those with a position
        for (; j < keys; ++j) {
            const auto key = key_positions ? key_positions[at + j] : static_cast<TokenIndex>(at + j);
            to[j] = std::clamp(key - query, -most, most) + most;
        }
    }
};

/// One head of one sequence. Strides are the distances between tokens.
template <typename T>
struct AttentionHead {
    const T *q, *k, *v;
    Index q_stride, kv_stride, dim_head, keys;
    const bool* mask;      // (keys) or null
    const T* value_scale;  // (keys) or null
    T scale;               // 1 / √dim_head
    // (keys) and (queries), or null: which keys and queries were not finite. Their rows have been replaced by zeros,
    // and their logits become NaN.
    const bool *nonfinite_keys = nullptr, *nonfinite_queries = nullptr;
    AttentionHeadBias<T> bias = {};
    const TokenIndex* key_counts = nullptr;  // (queries), or null: each sees that many keys, the first ones
};

template <typename T>
struct AttentionHeadGradients {
    T *d_q, *d_k, *d_v;  // d_q is assigned, d_k and d_v accumulate; d_v is with respect to value_scale ∘ v
    Index q_stride, kv_stride;
    T* d_bias = nullptr;  // (bias_copies, bias.entries()), accumulates scale · gradient; or null
};
/// Sums over neighbouring keys go to different copies, so that no addition waits for the one before it.
inline constexpr Index bias_copies = 8;

inline constexpr Index query_tile = 64, key_tile = 256;

/// Up to query_tile queries and blocks of keys: the online softmax, forward or backward.
template <typename T>
class AttentionTile {
public:
    AttentionTile(const AttentionHead<T>& head, Index first_query, Index queries)
        : head_(head), first_(first_query), queries_(queries) {}

    /// out rows (stride out_stride) are assigned; log_sum_exp (queries) may be null.
    void forward(T* out, Index out_stride, T* log_sum_exp) {
        for (Index i = 0; i < queries_; ++i) std::fill_n(out + i * out_stride, head_.dim_head, T(0));
        std::array<T, query_tile> largest, sum;
        largest.fill(-infinity);
        sum.fill(T(0));
        for (Index key = 0, end = most_keys(); key < end; key += key_tile) {
            const Index keys = std::min(key_tile, head_.keys - key);
            load_scores(key, keys);
            for (Index i = 0; i < queries_; ++i) {
                T* const row = scores_ + i * key_tile;
                const T top = std::max(largest[static_cast<std::size_t>(i)], row_max(row, keys));
                const T shift = top == -infinity ? T(0) : top;  // no key so far, or a NaN
                const T shrink = std::exp(largest[static_cast<std::size_t>(i)] - shift);
                T& total = sum[static_cast<std::size_t>(i)];
                total = total * shrink + exponentiate(row, keys, shift);
                if (head_.value_scale) multiply_row(row, head_.value_scale + key, keys);
                if (key > 0 && shrink != T(1)) scale_row(out + i * out_stride, head_.dim_head, shrink);
                largest[static_cast<std::size_t>(i)] = top;
            }
            gemm<Op::none, Op::none>(queries_, head_.dim_head, keys, T(1), scores_, key_tile,
                                     head_.v + key * head_.kv_stride, head_.kv_stride, out, out_stride);
        }
        for (Index i = 0; i < queries_; ++i) {
            const T total = sum[static_cast<std::size_t>(i)];
            scale_row(out + i * out_stride, head_.dim_head, total > T(0) ? T(1) / total : T(0));
            if (log_sum_exp) log_sum_exp[i] = largest[static_cast<std::size_t>(i)] + std::log(total);
        }
    }

    void backward(const AttentionHeadGradients<T>& d, const T* out, Index out_stride, const T* d_out,
                  Index d_out_stride, const T* log_sum_exp) {
        const Index dim = head_.dim_head;
        std::array<T, query_tile> out_dot;  // D_i = out_i · d_out_i
        for (Index i = 0; i < queries_; ++i) {
            out_dot[static_cast<std::size_t>(i)] = dot(out + i * out_stride, d_out + i * d_out_stride, dim);
            std::fill_n(d.d_q + (first_ + i) * d.q_stride, dim, T(0));
        }
        for (Index key = 0, end = most_keys(); key < end; key += key_tile) {
            const Index keys = std::min(key_tile, head_.keys - key);
            const Index at = key * head_.kv_stride, d_at = key * d.kv_stride;
            load_scores(key, keys);
            T* const d_scores = thread_scratch<T, struct ScoreGradients>(query_tile * key_tile);
            for (Index i = 0; i < queries_; ++i) std::fill_n(d_scores + i * key_tile, keys, T(0));
            gemm<Op::none, Op::transpose>(queries_, keys, dim, T(1), d_out, d_out_stride, head_.v + at, head_.kv_stride,
                                          d_scores, key_tile);
            for (Index i = 0; i < queries_; ++i) {
                T* const p = scores_ + i * key_tile;
                if (log_sum_exp[i] == -infinity)
                    std::fill_n(p, keys, T(0));
                else
                    exponentiate(p, keys, log_sum_exp[i]);
                if (head_.nonfinite_queries) set_weights(p, i, key, keys);
                finish_d_scores(d_scores + i * key_tile, p, key, keys, out_dot[static_cast<std::size_t>(i)]);
                if (d.d_bias) add_bias_gradient(i, key, keys, d_scores + i * key_tile, d.d_bias);
            }
            gemm<Op::transpose, Op::none>(keys, dim, queries_, T(1), scores_, key_tile, d_out, d_out_stride,
                                          d.d_v + d_at, d.kv_stride);
            gemm<Op::none, Op::none>(queries_, dim, keys, T(1), d_scores, key_tile, head_.k + at, head_.kv_stride,
                                     d.d_q + first_ * d.q_stride, d.q_stride);
            gemm<Op::transpose, Op::none>(keys, dim, queries_, T(1), d_scores, key_tile,
                                          head_.q + first_ * head_.q_stride, head_.q_stride, d.d_k + d_at, d.kv_stride);
        }
    }

private:
    static constexpr T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();

    /// How many of the `keys` keys from `key` on query i may see.
    Index keys_seen(Index i, Index key, Index keys) const {
        if (!head_.key_counts) return keys;
        return std::clamp(Index{head_.key_counts[first_ + i]} - key, Index{0}, keys);
    }
    /// The most keys that a query of the tile may see.
    Index most_keys() const {
        if (!head_.key_counts) return head_.keys;
        return std::min(head_.keys,
                        Index{*std::max_element(head_.key_counts + first_, head_.key_counts + first_ + queries_)});
    }

    const TokenIndex* bias_entries(Index i, Index key, Index keys) const {
        TokenIndex* const entries = thread_scratch<TokenIndex, struct BiasEntries>(key_tile);
        head_.bias.find_entries(first_ + i, key, keys, entries);
        return entries;
    }
    void add_bias_gradient(Index i, Index key, Index keys, const T* d_scores, T* d_bias) const {
        const TokenIndex* const entries = bias_entries(i, key, keys);
        for (Index j = 0; j < keys; ++j) d_bias[j % bias_copies * head_.bias.entries() + entries[j]] += d_scores[j];
    }

    /// scores = scale · q kᵀ + bias for a block of keys, −∞ where the key is masked
    void load_scores(Index key, Index keys) {
        scores_ = thread_scratch<T, struct Scores>(query_tile * key_tile);
        for (Index i = 0; i < queries_; ++i) std::fill_n(scores_ + i * key_tile, keys, T(0));
        gemm<Op::none, Op::transpose>(queries_, keys, head_.dim_head, head_.scale, head_.q + first_ * head_.q_stride,
                                      head_.q_stride, head_.k + key * head_.kv_stride, head_.kv_stride, scores_,
                                      key_tile);
        for (Index i = 0; i < queries_; ++i) {
            T* const row = scores_ + i * key_tile;
            if (head_.bias.of_entry) {
                const TokenIndex* const entries = bias_entries(i, key, keys);
                for (Index j = 0; j < keys; ++j) row[j] += head_.bias.of_entry[entries[j]];
            }
            if (head_.nonfinite_keys)
                for (Index j = 0; j < keys; ++j) row[j] = head_.nonfinite_keys[key + j] ? nan : row[j];
            if (head_.mask)
                for (Index j = 0; j < keys; ++j) row[j] = head_.mask[key + j] ? row[j] : -infinity;
            std::fill(row + keys_seen(i, key, keys), row + keys, -infinity);
        }
    }
    static T row_max(const T* row, Index count) {
        Batch<T> top(-infinity);
        for_each_batch<T>(count, [&](Index j, Index width) {
            const Batch<T> x = load(row + j, width);
            top = xsimd::max(top, width < lanes<T> ? pad(x, width, -infinity) : x);
        });
        return reduce_max(top);
    }
    /// row = exp(row − shift); returns its sum
    static T exponentiate(T* row, Index count, T shift) {
        Batch<T> total(T(0));
        for_each_batch<T>(count, [&](Index j, Index width) {
            Batch<T> e = cpu::exp(load(row + j, width) - Batch<T>(shift));
            if (width < lanes<T>) e = pad(e, width, T(0));
            store(row + j, e, width);
            total += e;
        });
        return reduce_add(total);
    }
    /// Weights of keys that query i does not see become 0 even if others are NaN; all others become NaN if the query is
    /// not finite.
    void set_weights(T* p, Index i, Index key, Index keys) const {
        const bool nonfinite = head_.nonfinite_queries[first_ + i];
        const Index seen = keys_seen(i, key, keys);
        for (Index j = 0; j < keys; ++j)
            p[j] = j >= seen || (head_.mask && !head_.mask[key + j]) ? T(0) : nonfinite ? nan : p[j];
    }
    /// d_scores, which holds d_out · vᵀ, becomes scale · p ∘ (value_scale ∘ d_scores − D): exactly 0 for a key of
    /// weight 0, whatever its value, and for one of weight 1, the only key that a query sees.
    void finish_d_scores(T* d_scores, const T* p, Index key, Index keys, T out_dot) const {
        if (head_.value_scale) multiply_row(d_scores, head_.value_scale + key, keys);
        for_each_batch<T>(keys, [&](Index j, Index width) {
            const Batch<T> d_p = load(d_scores + j, width) - Batch<T>(out_dot), weight = load(p + j, width);
            const Batch<T> zero(T(0)), one(T(1));
            store(d_scores + j,
                  xsimd::select((weight == zero) | (weight == one), zero, Batch<T>(head_.scale) * weight * d_p), width);
        });
    }

    const AttentionHead<T>& head_;
    Index first_, queries_;
    T* scores_ = nullptr;  // (query_tile, key_tile)
};

}  // namespace colt5::cpu
