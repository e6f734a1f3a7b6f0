// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention/mask.cuh>
#include <colt5/cuda/attention/online_softmax.cuh>

/// Recomputes single rows of attention that came out as NaN or infinite. The tile kernels multiply whole tiles, so that
/// a key that is not finite gives 0 · NaN = NaN even if the query does not see it: masked, out of reach, or hidden by
/// LimitedBias. The functions here skip such keys: a warp visits the pairs of query and key one by one. That is slow,
/// and rarely needed.
namespace colt5::cuda {

/// A row of up to 128 entries, distributed over the lanes of a warp; entries beyond its end are zeros.
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

/// The key range of one row: [begin, end) without masked keys. For a key, its range of queries.
struct MaskedKeyRange {
    int begin, end;
    const bool* mask;  // or null

    __device__ MaskedKeyRange(int position, Reach reach, int limit, const bool* mask_)
        : begin(::max(0, position - reach.before)), end(::min(limit, position + reach.after + 1)), mask(mask_) {}
    __device__ bool operator[](int i) const { return mask == nullptr || mask[i]; }
};

/// One bit for each of a warp's 16 rows: whether one of its accumulators is NaN or infinite.
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

/// Assigns out = Σ softmax(scale · add_bias(q · k)) value_scale v. In these functions `add_bias(product, i)` returns
/// the product q·k plus the bias of key i, or of query i; for a key, add_bias.hides(i) says whether query i does not
/// see it. Keys is Rows or PickedRows.
template <typename T, typename Sum, typename Keys, typename AddBias>
__device__ __noinline__ void attend_row(T* out, const T* q_row, Keys k, Keys v, MaskedKeyRange range,
                                        const Sum* value_scale, Sum to_log2, int dim, AddBias add_bias) {
    constexpr Sum infinity = std::numeric_limits<Sum>::infinity();
    const LaneEntries<Sum> q(q_row, dim);
    LaneEntries<Sum> sum;
    Sum largest = -infinity, total = 0;
    for (int j = range.begin; j < range.end; ++j) {
        if (!range[j]) continue;
        const Sum score = add_bias(q.dot(LaneEntries<Sum>(k[j], dim)), j) * to_log2, top = ::max(largest, score);
        const Sum shift = top == -infinity ? Sum(0) : top, shrink = fast_exp2(largest - shift);
        const Sum p = fast_exp2(score - shift);
        total = total * shrink + p;
        sum.scale(shrink);
        sum.add(value_scale != nullptr ? p * value_scale[j] : p, LaneEntries<Sum>(v[j], dim));
        largest = top;
    }
    sum.scale(total > Sum(0) ? Sum(1) / total : total * Sum(0));
    sum.store(out, dim);
}

/// D = Σ p dp; of a single key its dp. With `sees_zeros` the query sees keys of 0, too, so that no key is its only one.
template <typename T, typename Sum, typename Keys, typename AddBias>
__device__ __noinline__ Sum out_dot_of_row(const T* q_row, const T* d_out_row, Keys k, Keys v, MaskedKeyRange range,
                                           Sum shift, bool sees_zeros, Sum scale, int dim, AddBias add_bias) {
    const LaneEntries<Sum> q(q_row, dim), d_out(d_out_row, dim);
    const Sum to_log2 = scale * static_cast<Sum>(log2_e);
    Sum sum = 0, d_p = 0;
    int count = 0;
    for (int j = range.begin; j < range.end; ++j) {
        if (!range[j]) continue;
        d_p = d_out.dot(LaneEntries<Sum>(v[j], dim));
        sum += fast_exp2(add_bias(q.dot(LaneEntries<Sum>(k[j], dim)), j) * to_log2 - shift) * d_p;
        ++count;
    }
    return count == 1 && !sees_zeros ? d_p : sum;
}

/// Assigns d_q = scale · Σ ds k, which is 0 for a single key.
template <typename T, typename Sum, typename Keys, typename AddBias>
__device__ __noinline__ void query_gradient_row(T* d_q, const T* q_row, const T* d_out_row, Keys k, Keys v,
                                                MaskedKeyRange range, const Sum* value_scale, Sum shift, Sum out_dot,
                                                bool sees_zeros, Sum scale, int dim, AddBias add_bias) {
    const LaneEntries<Sum> q(q_row, dim), d_out(d_out_row, dim);
    const Sum to_log2 = scale * static_cast<Sum>(log2_e);
    LaneEntries<Sum> sum;
    int count = 0;
    for (int j = range.begin; j < range.end; ++j) {
        if (!range[j]) continue;
        const LaneEntries<Sum> key(k[j], dim);
        const Sum p = fast_exp2(add_bias(q.dot(key), j) * to_log2 - shift),
                  d_p = d_out.dot(LaneEntries<Sum>(v[j], dim));
        sum.add(p * (d_p * (value_scale != nullptr ? value_scale[j] : Sum(1)) - out_dot), key);
        ++count;
    }
    sum.scale(count == 1 && !sees_zeros ? Sum(0) : scale);
    sum.store(d_q, dim);
}

/// Assigns d_k = scale · Σ ds q and d_v = value_scale · Σ p d_out, summed over the key's range of queries. Returns
/// Σ p d_out · v.
template <typename T, typename Sum, typename Shifts, typename AddBias>
__device__ __noinline__ Sum key_gradient_row(T* d_k, T* d_v, const T* k_row, const T* v_row, Rows<const T> q,
                                             Rows<const T> d_out, MaskedKeyRange range, Shifts shifts, const Sum* dots,
                                             Sum value_scale, Sum scale, int dim, AddBias add_bias) {
    const LaneEntries<Sum> k(k_row, dim), v(v_row, dim);
    const Sum to_log2 = scale * static_cast<Sum>(log2_e);
    LaneEntries<Sum> of_k, of_v;
    bool is_seen = false;
    for (int i = range.begin; i < range.end; ++i) {
        if (add_bias.hides(i)) continue;
        is_seen = true;
        const LaneEntries<Sum> query(q[i], dim), d_o(d_out[i], dim);
        const Sum p = fast_exp2(add_bias(query.dot(k), i) * to_log2 - shifts[i]);
        of_v.add(p, d_o);
        of_k.add(p * (d_o.dot(v) * value_scale - dots[i]), query);
    }
    const Sum d_value_scale = is_seen ? of_v.dot(v) : Sum(0);
    of_k.scale(scale);
    of_v.scale(is_seen ? value_scale : Sum(1));  // 0 for a key that no query sees, whose value's scale may be NaN
    of_k.store(d_k, dim);
    of_v.store(d_v, dim);
    return d_value_scale;
}

}  // namespace colt5::cuda
