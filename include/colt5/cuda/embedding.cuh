// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include <colt5/cuda/kernel.cuh>
#include <colt5/cuda/top_k.cuh>
#include <colt5/op/embedding.hpp>

namespace colt5 {

namespace cuda {

/// One warp for each token. The output for an id outside the vocabulary is NaN.
template <typename T, int width>
__global__ void embed_rows(T* out, const T* weight, const TokenIndex* ids, Index vocabulary, Index columns,
                           Index count) {
    for (Index row = global_thread() / warp_size; row < count; row += grid_threads() / warp_size) {
        const Index id = ids[row];
        const bool known = id >= 0 && id < vocabulary;
        Pack<T, width> nan;
        for (T& value : nan.values) value = static_cast<T>(std::numeric_limits<accumulate_t<T>>::quiet_NaN());
        for (Index j = lane_id() * width; j < columns; j += warp_size * width)
            store_pack(out + row * columns + j, known ? load_pack<width>(weight + id * columns + j) : nan);
    }
}

/// Tokens sorted by id, then by position, as keys (id, position). Ids outside the vocabulary are replaced by
/// `vocabulary` and come last.
struct SortedIds {
    const std::uint64_t* keys;
    int position_bits;

    __device__ Index id(Index i) const { return static_cast<Index>(keys[i] >> position_bits); }
    __device__ Index position(Index i) const {
        return static_cast<Index>(keys[i] & ((std::uint64_t{1} << position_bits) - 1));
    }
};

/// position_bits < 32 and ids have 31 bits: the keys are distinct and fit.
template <typename Key>
__global__ void keys_of_ids(Key* keys, const TokenIndex* ids, Index vocabulary, int position_bits, Index count) {
    for (Index i = global_thread(); i < count; i += grid_threads()) {
        const Index id = ids[i], known = id >= 0 && id < vocabulary ? id : vocabulary;
        keys[i] = (static_cast<Key>(known) << position_bits) | static_cast<Key>(i);
    }
}

/// A warp sums, in a tile of columns, the rows of chunk `number` of the sorted tokens. A chunk has `chunk_size` tokens,
/// the last one perhaps fewer.
/// The sum of an id whose tokens are all in the chunk is added to d_weight. That of an id that begins in an earlier
/// chunk is written to parts[2 · number], that of an id that begins here and continues in the next chunk to
/// parts[2 · number + 1].
template <typename T, int width>
__global__ void sum_chunks(accumulate_t<T>* d_weight, accumulate_t<T>* parts, const T* rows, SortedIds sorted,
                           Index chunk_size, Index chunks, Index tiles, Index vocabulary, Index columns, Index count) {
    using Sum = accumulate_t<T>;
    constexpr int at_once = 8;  // rows whose loads overlap
    const Index warp = global_thread() / warp_size, number = warp / tiles;
    const Index j = (warp % tiles * warp_size + lane_id()) * width;
    if (number >= chunks || j >= columns) return;
    const Index first = number * chunk_size, last = ::min(first + chunk_size, count);
    const bool goes_on = last < count && sorted.id(last) == sorted.id(last - 1);
    bool began_before = first > 0 && sorted.id(first) == sorted.id(first - 1);
    Index id = sorted.id(first);
    Pack<Sum, width> sum{};
    const auto finish = [&](bool unfinished) {
        Sum* const part = parts + (2 * number + (began_before ? 0 : 1)) * columns + j;
        if (began_before || unfinished) {
            store_pack(part, sum);
        } else if (id < vocabulary) {
            Sum* const to = d_weight + id * columns + j;
            auto total = load_pack<width>(to);
            for (int k = 0; k < width; ++k) total.values[k] += sum.values[k];
            store_pack(to, total);
        }
    };
    for (Index begin = first; begin < last; begin += at_once) {
        Pack<T, width> packs[at_once];
        Index ids[at_once];
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
            if (begin + i >= last) continue;
            ids[i] = sorted.id(begin + i);
            packs[i] = load_pack<width>(rows + sorted.position(begin + i) * columns + j);
        }
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
            if (begin + i >= last) continue;
            if (ids[i] != id) {
                finish(false);
                began_before = false;
                id = ids[i];
                sum = {};
            }
            for (int k = 0; k < width; ++k) sum.values[k] += static_cast<Sum>(packs[i].values[k]);
        }
    }
    finish(goes_on);
}

/// For an id in several chunks, the warp of the chunk where it begins adds its parts to d_weight, in the order of the
/// chunks.
template <typename Sum, int width>
__global__ void add_chunks(Sum* d_weight, const Sum* parts, SortedIds sorted, Index chunk_size, Index chunks,
                           Index tiles, Index vocabulary, Index columns, Index count) {
    constexpr int at_once = 8;
    const Index warp = global_thread() / warp_size, number = warp / tiles;
    const Index j = (warp % tiles * warp_size + lane_id()) * width;
    if (number + 1 >= chunks || j >= columns) return;  // no id goes on after the last chunk
    const Index first = number * chunk_size, last = first + chunk_size, id = sorted.id(last - 1);
    const bool begins_here = first == 0 || sorted.id(first - 1) != id;
    if (id >= vocabulary || !begins_here || sorted.id(last) != id) return;
    const auto load_part = [&](Index part) { return load_pack<width>(parts + part * columns + j); };
    auto sum = load_part(2 * number + 1);
    bool goes_on = true;
    for (Index next = number + 1; goes_on; next += at_once) {
        Pack<Sum, width> packs[at_once];
        bool same[at_once];
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
            same[i] = next + i < chunks && sorted.id((next + i) * chunk_size) == id;
            if (same[i]) packs[i] = load_part(2 * (next + i));
        }
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
            if (!same[i]) {
                goes_on = false;
                continue;
            }
            for (int k = 0; k < width; ++k) sum.values[k] += packs[i].values[k];
        }
    }
    Sum* const to = d_weight + id * columns + j;
    auto total = load_pack<width>(to);
    for (int k = 0; k < width; ++k) total.values[k] += sum.values[k];
    store_pack(to, total);
}

}  // namespace cuda

template <typename T>
void embedding_kernel(const Cuda& policy, MatrixView<T> out, MatrixView<const T> weight,
                      VectorView<const TokenIndex> ids) {
    constexpr int threads = 256;
    const Index dim = weight.extent(1);
    cuda::with_pack_size<T>(
        dim,
        [&]<int width>(std::integral_constant<int, width>) {
            cuda::launch(policy, "embed_rows", cuda::embed_rows<T, width>,
                         cuda::blocks_for(ids.size() * cuda::warp_size, threads), threads, 0, out.data(), weight.data(),
                         ids.data(), weight.extent(0), dim, ids.size());
        },
        out.data(), weight.data());
}

/// Sorts the tokens by id, sums the rows of each id within chunks of sorted tokens, then adds the sums of chunks in
/// order. Chunks are cut by the number of tokens, not by id, so that many warps share a frequent id.
template <typename T>
void embedding_vjp_kernel(const Cuda& policy, MatrixView<accumulate_t<T>> d_weight, MatrixView<const T> d_out,
                          VectorView<const TokenIndex> ids) {
    using Sum = accumulate_t<T>;
    using Key = std::uint64_t;
    constexpr int threads = 256;
    constexpr Index least_chunk = 64, most_chunks = 2048;
    const Index count = ids.size(), dim = d_weight.extent(1), vocabulary = d_weight.extent(0);
    if (count == 0 || dim == 0) return;
    const int position_bits = std::bit_width(static_cast<std::size_t>(count - 1));
    VectorTensor<Key, Cuda> keys(policy, {count}), sorted(policy, {count});
    cuda::launch(policy, "keys_of_ids", cuda::keys_of_ids<Key>, cuda::blocks_for(count, threads), threads, 0,
                 keys.data(), ids.data(), vocabulary, position_bits, count);
    constexpr Index first_run = 512;
    cuda::launch(policy, "sort_runs", cuda::sort_runs<Key, first_run>,
                 cuda::grid(divide_up(count * cuda::warp_size, threads)), threads, 0, sorted.data(),
                 static_cast<TokenIndex*>(nullptr), keys.data(), Index{1}, count, position_bits);
    for (Index run = first_run; run < count; run *= 2) {
        std::swap(keys, sorted);
        cuda::launch(policy, "merge_runs", cuda::merge_runs<Key>, cuda::blocks_for(count, threads), threads, 0,
                     sorted.data(), keys.data(), Index{1}, count, run);
    }
    const cuda::SortedIds by_id{sorted.data(), position_bits};
    const Index chunk_size = std::max(least_chunk, divide_up(count, most_chunks)),
                chunks = divide_up(count, chunk_size);
    TokensTensor<Sum, Cuda> parts(policy, {chunks, 2, dim});
    cuda::with_pack_size<T>(
        dim,
        [&]<int width>(std::integral_constant<int, width>) {
            const Index tiles = divide_up(dim, cuda::warp_size * width);
            const auto blocks = cuda::grid(divide_up(chunks * tiles * cuda::warp_size, threads));
            cuda::launch(policy, "sum_chunks", cuda::sum_chunks<T, width>, blocks, threads, 0, d_weight.data(),
                         parts.data(), d_out.data(), by_id, chunk_size, chunks, tiles, vocabulary, dim, count);
            cuda::launch(policy, "add_chunks", cuda::add_chunks<Sum, width>, blocks, threads, 0, d_weight.data(),
                         parts.data(), by_id, chunk_size, chunks, tiles, vocabulary, dim, count);
        },
        d_out.data(), d_weight.data(), parts.data());
}

}  // namespace colt5
