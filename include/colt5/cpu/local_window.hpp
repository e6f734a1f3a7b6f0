// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/cpu/tile_product.hpp>
#include <colt5/op/local_attention.hpp>

/// Local attention: the keys and values that a segment of queries sees.
namespace colt5::cpu {

/// The keys and values of one head of one sequence: those of token j start at k + j · stride and v + j · stride.
template <typename T>
struct LocalHead {
    LocalHead(View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> kv, Mask key_mask, Index b, Index h,
              const LocalAttention& attention)
        : length(kv.extent(1)),
          dim(kv.extent(4)),
          stride(2 * kv.extent(3) * dim),
          reach(std::min(attention.reach, length)),
          ahead(attention.causal ? 0 : reach),
          k(kv.data() + b * length * stride + h * dim),
          v(k + kv.extent(3) * dim),
          mask(key_mask ? key_mask[b].data() : nullptr) {}
    Index length, dim, stride;
    Index reach, ahead;  // how many tokens before and after itself a query sees
    const T *k, *v;
    const bool* mask;  // (length) or null
};

/// Prefetches rows that are read soon: they are so far apart that the hardware does not.
template <typename T>
void prefetch_rows(const T* rows, Index count, Index stride, Index length) {
    constexpr Index line = 64 / static_cast<Index>(sizeof(T));
    for (Index i = 0; i < count; ++i)
        for (Index e = 0; e < length; e += line) __builtin_prefetch(rows + i * stride + e, 0, 2);
}

/// The sizes of tiles: queries lie along the lanes of batches, so that the softmax of many rows runs down their keys
/// without a sum across lanes. A group of queries is processed together with every block of keys that one of them sees.
template <typename T>
struct LocalTile {
    static constexpr Index group = std::max(lanes<T>, Index{8});
    static constexpr Index queries = block_rows == 6 ? 48 : 32, batches = queries / lanes<T>, groups = queries / group;
    static constexpr Index keys = 504;  // at a time; a wider window is processed in several steps
    static_assert(queries % group == 0 && queries % block_rows == 0 && keys % block_rows == 0);

    /// Whether the keys of any tile fit into one block.
    static constexpr bool one_block(Index reach, Index ahead) {
        return reach <= keys && reach + ahead + queries + block_rows <= keys;
    }
    /// The length of a row of dim entries, in whole batches.
    static Index row(Index dim) { return round_up(dim, lanes<T>); }
};

/// The keys and values that a segment of queries sees, row by row without gaps, in whole blocks and whole batches that
/// end in zeros. Tokens whose key or value is not finite become zeros, too, so that products over them are finite where
/// their weight is 0; queries that see them get NaN by their score.
template <typename T>
class LocalWindow {
    bool finite_ = true;
    bool* nonfinite_ = nullptr;  // (rows), unless all are finite

public:
    LocalWindow(const LocalHead<T>& head, Index begin, Index end)
        : first(std::max(Index{0}, begin - head.reach) / block_rows * block_rows),
          last(std::min(head.length, end + head.ahead)),
          rows(round_up(last - first, block_rows)),
          stride(LocalTile<T>::row(head.dim)),
          k(pack(head.k, head, thread_scratch<T, struct WindowKeys>(rows * stride))),
          v(pack(head.v, head, thread_scratch<T, struct WindowValues>(rows * stride))) {
        if (!finite_) clear_nonfinite();
    }

    bool is_finite() const { return finite_; }
    /// Whether a query that sees token j gets NaN.
    bool is_nonfinite(Index j) const { return !finite_ && nonfinite_[j - first]; }

    const Index first, last, rows, stride;
    T *const k, *const v;

private:
    T* pack(const T* from, const LocalHead<T>& head, T* to) {
        constexpr Index ahead = 16;  // rows
        Batch<T> found(T(0));
        for (Index j = first; j < last; ++j) {
            prefetch_rows(from + (j + ahead) * head.stride, j + ahead < last ? 1 : 0, head.stride, head.dim);
            for_each_batch<T>(head.dim, [&](Index e, Index width) {
                const Batch<T> x = load(from + j * head.stride + e, width);
                found = look_for_nonfinite(x, found);
                store(to + (j - first) * stride + e, x);
            });
        }
        finite_ = finite_ && !found_nonfinite(found);
        std::fill(to + (last - first) * stride, to + rows * stride, T(0));
        return to;
    }
    void clear_nonfinite() {
        nonfinite_ = thread_scratch<bool, struct WindowNonfinite>(rows);
        for (Index j = 0; j < rows; ++j) {
            nonfinite_[j] = !all_finite(k + j * stride, stride) || !all_finite(v + j * stride, stride);
            if (!nonfinite_[j]) continue;
            std::fill_n(k + j * stride, stride, T(0));
            std::fill_n(v + j * stride, stride, T(0));
        }
    }
};

}  // namespace colt5::cpu
