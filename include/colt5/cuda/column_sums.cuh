// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>

#include <colt5/core/tensor.hpp>
#include <colt5/cuda/kernel.cuh>

/// Gradients of parameters that all rows share, in two steps with a fixed order: each block sums over its rows, then
/// add_partials sums over the blocks.
namespace colt5::cuda {

inline constexpr int sum_threads = 256, add_threads = 1024;

/// How rows are shared out: by their number alone, so that the order of sums is the same everywhere.
struct RowShares {
    Index blocks, rows_each;
    explicit RowShares(Index rows, Index max_blocks = 512, Index min_rows = 32) {
        rows_each = std::max(min_rows, divide_up(rows, max_blocks));
        blocks = divide_up(rows, rows_each);
    }
};

/// `count` vectors of `columns` entries, indexed as if they followed each other.
template <typename Sum, int count>
struct Totals {
    Sum* to[count];
    Index columns;
    COLT5_HOST_DEVICE Index all() const { return count * columns; }
    __device__ Sum& operator[](Index column) const {
        int i = 0;
        for (; column >= columns; column -= columns) ++i;
        return to[i][column];
    }
};

/// total[column] += Σ over the `rows` rows of partial. A block has 32 columns and 32 groups of rows.
template <typename Sum, int count>
__global__ void add_partials(Totals<Sum, count> total, const Sum* partial, Index rows) {
    constexpr int groups = add_threads / warp_size;
    __shared__ Sum shared[groups][warp_size];
    const int lane = lane_id(), group = static_cast<int>(threadIdx.x) / warp_size;
    const Index column = static_cast<Index>(blockIdx.x) * warp_size + lane, columns = total.all();
    Sum sum = 0;
    if (column < columns)
#pragma unroll 8
        for (Index i = group; i < rows; i += groups) sum += partial[i * columns + column];
    shared[group][lane] = sum;
    __syncthreads();
    if (group != 0 || column >= columns) return;
    for (int g = 1; g < groups; ++g) sum += shared[g][lane];
    total[column] += sum;
}
template <typename Sum, int count>
void launch_add_partials(const Cuda& policy, const Totals<Sum, count>& total, const Sum* partial, Index rows) {
    launch(policy, "add_partials", add_partials<Sum, count>, grid(divide_up(total.all(), warp_size)), add_threads, 0,
           total, partial, rows);
}

/// The rows of one route of dy (b, r, n, out), those of all sequences one after the other.
template <typename T>
struct RouteRows {
    const T* data;
    Index length, routes, route, columns;
    __device__ const T* row(Index i) const {
        if (routes == 1) return data + i * columns;
        const Index sequence = quotient(i, length) * routes + route;
        return data + (sequence * length + i % length) * columns;
    }
};

/// In a block, thread i has the columns of lane i % lanes, and the rows of group i / lanes. Writes the sums over all
/// groups to the `width` entries of `to`, if `mine`, that is, if the lane has columns. The whole block calls it.
template <int width, typename Sum>
__device__ void sum_over_groups(Sum* to, const Sum (&sum)[width], Sum (*shared)[width], int lanes, bool mine) {
    const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
    const int groups = sum_threads / lanes;
    for (int e = 0; e < width; ++e) shared[threadIdx.x][e] = sum[e];
    __syncthreads();
    if (group == 0 && mine)
        for (int e = 0; e < width; ++e) {
            Sum total = 0;
            for (int g = 0; g < groups; ++g) total += shared[g * lanes + lane][e];
            to[e] = total;
        }
    __syncthreads();
}
/// So many lanes that their packs of `width` columns cover a row, or as many as a block has threads.
inline int lanes_of_columns(Index columns, int width) {
    int lanes = warp_size;
    while (lanes < sum_threads && lanes * width < columns) lanes *= 2;
    return lanes;
}

/// partial[block, column] = Σ over a block's rows. A block covers `lanes` packs of columns, and sum_threads / lanes
/// rows at a time.
template <int width, typename T>
__global__ void __launch_bounds__(sum_threads)
    sum_rows(accumulate_t<T>* partial, RouteRows<T> from, Index rows, Index rows_each, int lanes) {
    using Sum = accumulate_t<T>;
    __shared__ Sum shared[sum_threads][width];
    const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
    const int groups = sum_threads / lanes;
    const Index end = ::min(rows, (blockIdx.x + 1) * rows_each);
    for (Index first = 0; first < from.columns; first += lanes * width) {
        const Index column = first + lane * width;
        const bool mine = column < from.columns;
        Sum sum[width] = {};
        if (mine)
#pragma unroll 4
            for (Index row = blockIdx.x * rows_each + group; row < end; row += groups) {
                const auto pack = load_pack<width>(from.row(row) + column);
                for (int e = 0; e < width; ++e) sum[e] += static_cast<Sum>(pack.values[e]);
            }
        sum_over_groups(partial + blockIdx.x * from.columns + column, sum, shared, lanes, mine);
    }
}

/// total[column] += Σ over rows: the gradient of a bias.
template <typename T>
void add_column_sums(const Cuda& policy, accumulate_t<T>* total, Index rows, const RouteRows<T>& from) {
    const RowShares shares(rows);
    MatrixTensor<accumulate_t<T>, Cuda> partial(policy, {shares.blocks, from.columns});
    const bool packed = fits_packs<T>(from.columns, from.data);
    const int lanes = lanes_of_columns(from.columns, packed ? pack_size<T> : 1);
    launch(policy, "sum_rows", packed ? sum_rows<pack_size<T>, T> : sum_rows<1, T>, grid(shares.blocks), sum_threads, 0,
           partial.data(), from, rows, shares.rows_each, lanes);
    launch_add_partials(policy, Totals<accumulate_t<T>, 1>{{total}, from.columns}, partial.data(), shares.blocks);
}

/// `columns` sums over a block's rows. Each warp sums over its own rows, in shared memory or, where that is too small,
/// in global memory.
template <typename Sum>
class WarpSums {
public:
    __device__ WarpSums(Sum* global, Index columns) : columns_(columns) {
        extern __shared__ __align__(16) std::byte shared[];
        const Index warps = blockDim.x / warp_size;
        first_ = global != nullptr ? global + blockIdx.x * warps * columns : reinterpret_cast<Sum*>(shared);
        for (Index i = threadIdx.x; i < warps * columns; i += blockDim.x) first_[i] = 0;
        __syncthreads();
    }
    /// The row of sums of the calling warp.
    __device__ Sum* mine() const { return first_ + threadIdx.x / warp_size * columns_; }
    /// partial[block, column] = Σ over warps
    __device__ void write(Sum* partial) const {
        __syncthreads();
        for (Index column = threadIdx.x; column < columns_; column += blockDim.x) {
            Sum sum = 0;
            for (int warp = 0; warp < static_cast<int>(blockDim.x) / warp_size; ++warp)
                sum += first_[warp * columns_ + column];
            partial[blockIdx.x * columns_ + column] = sum;
        }
    }

private:
    Sum* first_;
    Index columns_;
};

/// `count` sums for each column over the rows of a warp. They are in registers, with the distribution of WarpRow, until
/// `flush` writes them to the warp's row of WarpSums, one after the other. With packs = 0 they are in WarpSums from the
/// start.
template <typename Sum, int count, int width, int packs>
class LaneSums {
public:
    __device__ LaneSums(Sum* warp_sums, Index d) : warp_sums_(warp_sums), d_(d) {}
    __device__ void add(int sum, int i, Index, int e, Sum value) { sums_[sum][i][e] += value; }
    __device__ void flush() const {
#pragma unroll
        for (int sum = 0; sum < count; ++sum)
#pragma unroll
            for (int i = 0; i < packs; ++i) {
                const Index j = (lane_id() + i * warp_size) * width;
                if (j < d_)
                    for (int e = 0; e < width; ++e) warp_sums_[sum * d_ + j + e] = sums_[sum][i][e];
            }
    }

private:
    Sum* warp_sums_;
    Index d_;
    Sum sums_[count][packs][width] = {};
};

template <typename Sum, int count, int width>
class LaneSums<Sum, count, width, 0> {
public:
    __device__ LaneSums(Sum* warp_sums, Index d) : warp_sums_(warp_sums), d_(d) {}
    __device__ void add(int sum, int, Index j, int e, Sum value) { warp_sums_[sum * d_ + j + e] += value; }
    __device__ void flush() const {}

private:
    Sum* warp_sums_;
    Index d_;
};

/// The blocks of a multiprocessor for which the compiler leaves registers, where a lane has `sums` sums and three rows
/// of T. With two, twice as many loads are in flight; more would not leave room for 64 sums and rows of 16-bit numbers.
template <typename T, int sums>
inline constexpr int blocks_with_sums = sizeof(T) == 2 && sums <= 64 ? 2 : 1;

/// Launches kernel(arguments..., partial, global, rows, rows_each), whose blocks each write WarpSums(global, columns)
/// to `partial`. Adds the sums over all rows to the totals.
template <typename Sum, int count, typename Kernel, typename... Arguments>
void launch_with_sums(const Cuda& policy, const char* name, Kernel kernel, const Totals<Sum, count>& totals, Index rows,
                      const Arguments&... arguments) {
    const Index columns = totals.all();
    const RowShares shares(rows);
    constexpr Index warps = sum_threads / warp_size;
    const auto shared_bytes = static_cast<std::size_t>(warps * columns) * sizeof(Sum);
    const bool in_shared = shared_bytes <= 96 * 1024;
    MatrixTensor<Sum, Cuda> partial(policy, {shares.blocks, columns});
    VectorTensor<Sum, Cuda> global(policy, {in_shared ? 0 : shares.blocks * warps * columns});
    launch(policy, name, kernel, grid(shares.blocks), sum_threads, in_shared ? shared_bytes : 0, arguments...,
           partial.data(), in_shared ? static_cast<Sum*>(nullptr) : global.data(), rows, shares.rows_each);
    launch_add_partials(policy, totals, partial.data(), shares.blocks);
}

}  // namespace colt5::cuda
