// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention/bias.cuh>
#include <colt5/cuda/attention/stage.cuh>

namespace colt5::cuda {

/// The index of the calling warp's part of the gradient.
template <typename T>
__device__ Index part_of_warp(const Attention<T>& a, const AttentionBlock<T>& block, int warps) {
    const auto heads = static_cast<unsigned>(a.heads());
    const Index parts = static_cast<Index>(gridDim.x / heads) * warps;
    return (static_cast<Index>(block.b) * a.heads() + block.h) * parts +
           static_cast<Index>(blockIdx.x / heads) * warps + static_cast<int>(threadIdx.x) / warp_size;
}

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
    static constexpr int row_entries = Shape::slides ? 2 * SlidingWindowTuning::rows + 1 : 0;
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
        if (Shape::slides && span_ <= SlidingWindowTuning::rows)
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

/// The gradient of `inner`: d_s of hidden pairs is already 0.
template <typename Shape, typename Inner>
class BiasGradient<Shape, LimitedBias<Inner>> : public BiasGradient<Shape, Inner> {
public:
    using T = typename Shape::T;
    __device__ BiasGradient(const Attention<T>& a, const AttentionBlock<T>& block, const LimitedBias<Inner>& bias,
                            unsigned char* memory)
        : BiasGradient<Shape, Inner>(a, block, bias.inner, memory) {}
};

}  // namespace colt5::cuda
