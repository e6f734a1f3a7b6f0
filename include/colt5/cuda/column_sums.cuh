// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/launch.cuh>

namespace colt5::cuda {

inline constexpr int column_tile = 32, row_lanes = 8;
inline constexpr Index rows_per_chunk = 512;

/// partial[chunk, column] = Σ over the rows of a chunk of entry(row, column); a block has 32 columns of one chunk.
template <typename Sum, typename Entry>
__global__ void sum_chunks(Sum* partial, Index rows, Index columns, Entry entry) {
    __shared__ Sum sums[row_lanes][column_tile];
    const Index column = static_cast<Index>(blockIdx.x) * column_tile + threadIdx.x % column_tile;
    const Index lane = threadIdx.x / column_tile, chunk = blockIdx.y;
    const Index end = ::min(rows, (chunk + 1) * rows_per_chunk);
    Sum sum = 0;
    if (column < columns)
        for (Index row = chunk * rows_per_chunk + lane; row < end; row += row_lanes) sum += entry(row, column);
    sums[lane][threadIdx.x % column_tile] = sum;
    __syncthreads();
    if (lane != 0 || column >= columns) return;
    for (int i = 1; i < row_lanes; ++i) sum += sums[i][threadIdx.x];
    partial[chunk * columns + column] = sum;
}

/// total[column] += Σ over the chunks, in order
template <typename Sum>
__global__ void add_chunks(Sum* total, const Sum* partial, Index chunks, Index columns) {
    const Index column = global_thread();
    if (column >= columns) return;
    Sum sum = 0;
    for (Index chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * columns + column];
    total[column] += sum;
}

/// total[column] += Σ over rows of entry(row, column): the gradient of a parameter that every row shares. `entry` is
/// a functor for the device. The order of the sum depends on the number of rows alone.
template <typename Sum, typename Entry>
void add_column_sums(const Cuda& policy, VectorView<Sum> total, Index rows, const Entry& entry) {
    const Index columns = total.size(), chunks = divide_up(rows, rows_per_chunk);
    MatrixTensor<Sum, Cuda> partial(policy, {chunks, columns});
    launch(policy, "sum_chunks", sum_chunks<Sum, Entry>, grid(divide_up(columns, column_tile), chunks),
           column_tile * row_lanes, 0, partial.data(), rows, columns, entry);
    constexpr int threads = 128;
    launch(policy, "add_chunks", add_chunks<Sum>, grid(divide_up(columns, threads)), threads, 0, total.data(),
           partial.data(), chunks, columns);
}

}  // namespace colt5::cuda
