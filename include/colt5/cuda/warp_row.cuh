// SPDX-License-Identifier: MIT
#pragma once

#include <type_traits>

#include <colt5/cuda/pack.cuh>

namespace colt5::cuda {

/// A row of d entries, distributed over the lanes of a warp in packs of `width` entries. Each lane loads its `packs`
/// packs into registers at once, so that their latencies overlap. With packs = 0 the row may have any length, and is
/// loaded again by each loop. In a row of padding, values that are not finite count as 0.
template <typename T, int width, int packs>
class WarpRow {
public:
    __device__ WarpRow(const T* row, Index d, bool padding = false) : d_(d) {
#pragma unroll
        for (int i = 0; i < packs; ++i)
            if (column(i) < d) packs_[i] = load_pack<width>(row + column(i));
        if (!padding) return;
#pragma unroll
        for (int i = 0; i < packs; ++i) packs_[i] = finite_or_zero(packs_[i]);
    }
    /// Calls body(j, pack) for each of the lane's packs, where j is the column of its first entry.
    template <typename Body>
    __device__ void for_each(const Body& body) const {
#pragma unroll
        for (int i = 0; i < packs; ++i)
            if (column(i) < d_) body(column(i), packs_[i]);
    }
    /// Calls body(i, j, pack, packs of the other rows...), where i is the number of the pack.
    template <typename Body, typename... Others>
    __device__ void for_each_with(const Body& body, const Others&... others) const {
#pragma unroll
        for (int i = 0; i < packs; ++i)
            if (column(i) < d_) body(i, column(i), packs_[i], others.packs_[i]...);
    }

private:
    __device__ static Index column(int i) {
        return (lane_id() + i * warp_size) * width;
    }
    Index d_;
    Pack<T, width> packs_[packs];
};

template <typename T, int width>
class WarpRow<T, width, 0> {
public:
    __device__ WarpRow(const T* row, Index d, bool padding = false) : row_(row), d_(d), padding_(padding) {}
    template <typename Body>
    __device__ void for_each(const Body& body) const {
        for (Index j = first(); j < d_; j += warp_size * width) body(j, pack(j));
    }
    template <typename Body, typename... Others>
    __device__ void for_each_with(const Body& body, const Others&... others) const {
        for (Index j = first(); j < d_; j += warp_size * width) body(0, j, pack(j), others.pack(j)...);
    }

private:
    __device__ static Index first() { return lane_id() * width; }
    __device__ Pack<T, width> pack(Index j) const {
        const auto as_it_is = load_pack<width>(row_ + j);
        return padding_ ? finite_or_zero(as_it_is) : as_it_is;
    }
    const T* row_;
    Index d_;
    bool padding_;
};

/// `count` sums for each column over the rows of a warp. They are in registers, with the distribution of WarpRow, until
/// `flush` writes them to the warp's row of WarpSums, one after the other. With packs = 0 they are in WarpSums from the
/// start.
template <typename Sum, int count, int width, int packs>
class LaneSums {
public:
    __device__ LaneSums(Sum* of_warp, Index d) : of_warp_(of_warp), d_(d) {}
    __device__ void add(int sum, int i, Index, int e, Sum value) { sums_[sum][i][e] += value; }
    __device__ void flush() const {
#pragma unroll
        for (int sum = 0; sum < count; ++sum)
#pragma unroll
            for (int i = 0; i < packs; ++i) {
                const Index j = (lane_id() + i * warp_size) * width;
                if (j < d_)
                    for (int e = 0; e < width; ++e) of_warp_[sum * d_ + j + e] = sums_[sum][i][e];
            }
    }

private:
    Sum* of_warp_;
    Index d_;
    Sum sums_[count][packs][width] = {};
};

template <typename Sum, int count, int width>
class LaneSums<Sum, count, width, 0> {
public:
    __device__ LaneSums(Sum* of_warp, Index d) : of_warp_(of_warp), d_(d) {}
    __device__ void add(int sum, int, Index j, int e, Sum value) { of_warp_[sum * d_ + j + e] += value; }
    __device__ void flush() const {}

private:
    Sum* of_warp_;
    Index d_;
};

/// Calls run.template operator()<width, packs>() with the template arguments of WarpRow for consecutive rows of d
/// entries from each of the addresses on.
template <typename T, typename Run, typename... Pointers>
void with_warp_row(Index d, const Run& run, const Pointers*... rows) {
    constexpr int width = pack_size<T>;
    if (!fits_packs<T>(d, rows...))
        run.template operator()<1, 0>();
    else if (d <= 2 * warp_size * width)
        run.template operator()<width, 2>();
    else if (d <= 4 * warp_size * width)
        run.template operator()<width, 4>();
    else if (d <= 8 * warp_size * width)
        run.template operator()<width, 8>();
    else
        run.template operator()<width, 0>();
}

}  // namespace colt5::cuda
