// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention_tile.cuh>

/// Rows of attention one pair of query and key at a time, by a warp, leaving out the pairs that do not see each other:
/// for rows in which a product over a tile met 0 · NaN. Slow, and rarely needed: where masked tokens hold what is not
/// finite, or real ones out of reach do.
namespace colt5::cuda {

/// A row of up to 128 entries, shared between the lanes of a warp; zeros beyond it.
template <typename Sum>
struct LaneEntries {
    Sum values[4] = {};

    LaneEntries() = default;
    template <typename T>
    __device__ LaneEntries(const T* row, int dim) {
        for_each(dim, [&](int i, int e) { values[i] = static_cast<Sum>(row[e]); });
    }
    template <typename Body>
    __device__ static void for_each(int dim, const Body& body) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (lane_id() + i * warp_size < dim) body(i, lane_id() + i * warp_size);
    }
    __device__ Sum dot(const LaneEntries& other) const {
        Sum sum = 0;
        for (int i = 0; i < 4; ++i) sum += values[i] * other.values[i];
        return warp_sum(sum);
    }
    __device__ void add(Sum factor, const LaneEntries& other) {
        for (int i = 0; i < 4; ++i) values[i] += factor * other.values[i];
    }
    __device__ void scale(Sum factor) {
        for (int i = 0; i < 4; ++i) values[i] *= factor;
    }
    template <typename T>
    __device__ void store(T* row, int dim) const {
        for_each(dim, [&](int i, int e) { row[e] = static_cast<T>(values[i]); });
    }
};

/// The rows of the other side that a row sees: [begin, end) without those that are masked.
struct RowsSeen {
    int begin, end;
    const bool* mask;  // or null

    __device__ RowsSeen(int position, int reach, int limit, const bool* mask_)
        : begin(::max(0, position - reach)), end(::min(limit, position + reach + 1)), mask(mask_) {}
    __device__ bool operator[](int i) const { return mask == nullptr || mask[i]; }
};

/// Which of a warp's 16 rows have an accumulator that is NaN, a bit each.
template <int blocks, typename Sum>
__device__ unsigned rows_with_nan(const Sum (&acc)[blocks][4]) {
    Sum zero[2] = {0, 0};  // or NaN
#pragma unroll
    for (int j = 0; j < blocks; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) zero[e / 2] += acc[j][e] * Sum(0);
    unsigned rows = 0;
    for (int half = 0; half < 2; ++half) {
        const unsigned lanes = __ballot_sync(0xffffffffu, !(zero[half] == Sum(0)));
        if (lanes == 0) continue;
        for (int row = 0; row < 8; ++row)
            if ((lanes >> 4 * row & 0xfu) != 0) rows |= 1u << (row + 8 * half);
    }
    return rows;
}

/// out = Σ softmax(q · k) value_scale v
template <typename T, typename Sum>
__device__ __noinline__ void attend_row(T* out, const T* q_row, Rows<const T> k, Rows<const T> v, RowsSeen seen,
                                        const Sum* value_scale, Sum to_log2, int dim) {
    constexpr Sum infinity = std::numeric_limits<Sum>::infinity();
    const LaneEntries<Sum> q(q_row, dim);
    LaneEntries<Sum> sum;
    Sum largest = -infinity, total = 0;
    for (int j = seen.begin; j < seen.end; ++j) {
        if (!seen[j]) continue;
        const Sum score = q.dot(LaneEntries<Sum>(k[j], dim)) * to_log2, top = ::max(largest, score);
        const Sum shift = top == -infinity ? Sum(0) : top, shrink = power_of_two(largest - shift);
        const Sum p = power_of_two(score - shift);
        total = total * shrink + p;
        sum.scale(shrink);
        sum.add(value_scale != nullptr ? p * value_scale[j] : p, LaneEntries<Sum>(v[j], dim));
        largest = top;
    }
    sum.scale(total > Sum(0) ? Sum(1) / total : total * Sum(0));
    sum.store(out, dim);
}

/// d_q = scale · Σ ds k
template <typename T, typename Sum>
__device__ __noinline__ void query_gradient_row(T* d_q, const T* q_row, const T* d_out_row, Rows<const T> k,
                                                Rows<const T> v, RowsSeen seen, const Sum* value_scale, Sum shift,
                                                Sum out_dot, Sum scale, int dim) {
    const LaneEntries<Sum> q(q_row, dim), d_out(d_out_row, dim);
    const Sum to_log2 = scale * static_cast<Sum>(log2_e);
    LaneEntries<Sum> sum;
    int count = 0;
    for (int j = seen.begin; j < seen.end; ++j) {
        if (!seen[j]) continue;
        const LaneEntries<Sum> key(k[j], dim);
        const Sum p = power_of_two(q.dot(key) * to_log2 - shift), d_p = d_out.dot(LaneEntries<Sum>(v[j], dim));
        sum.add(p * (d_p * (value_scale != nullptr ? value_scale[j] : Sum(1)) - out_dot), key);
        ++count;
    }
    sum.scale(count == 1 ? Sum(0) : scale);
    sum.store(d_q, dim);
}

/// d_k = scale · Σ ds q and d_v = value_scale · Σ p d_out over the queries that see a key. Returns Σ p d_out · v.
template <typename T, typename Sum>
__device__ __noinline__ Sum key_gradient_row(T* d_k, T* d_v, const T* k_row, const T* v_row, Rows<const T> q,
                                             Rows<const T> d_out, RowsSeen seen, const Sum* shifts, const Sum* dots,
                                             Sum value_scale, Sum scale, int dim) {
    const LaneEntries<Sum> k(k_row, dim), v(v_row, dim);
    const Sum to_log2 = scale * static_cast<Sum>(log2_e);
    LaneEntries<Sum> of_k, of_v;
    for (int i = seen.begin; i < seen.end; ++i) {
        const LaneEntries<Sum> query(q[i], dim), d_o(d_out[i], dim);
        const Sum p = power_of_two(query.dot(k) * to_log2 - shifts[i]);
        of_v.add(p, d_o);
        of_k.add(p * (d_o.dot(v) * value_scale - dots[i]), query);
    }
    const Sum d_value_scale = of_v.dot(v);
    of_k.scale(scale);
    of_v.scale(value_scale);
    of_k.store(d_k, dim);
    of_v.store(d_v, dim);
    return d_value_scale;
}

}  // namespace colt5::cuda
