// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include <colt5/cpu/linear.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/cpu/tile_product.hpp>
#include <colt5/op/local_attention.hpp>

namespace colt5 {

namespace cpu {

/// The keys and values of one head of one sequence: those of token j start at k + j · stride and v + j · stride.
template <typename T>
struct LocalHead {
    LocalHead(View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> kv, Mask key_mask, Index b, Index h,
              Index reach_)
        : length(kv.extent(1)),
          dim(kv.extent(4)),
          stride(2 * kv.extent(3) * dim),
          reach(std::min(reach_, length)),
          k(kv.data() + b * length * stride + h * dim),
          v(k + kv.extent(3) * dim),
          mask(key_mask ? key_mask[b].data() : nullptr) {}
    Index length, dim, stride, reach;
    const T *k, *v;
    const bool* mask;  // (length) or null
};

/// Asks the caches for rows that are read soon: they are far apart, which the processor does not foresee.
template <typename T>
void prefetch_rows(const T* rows, Index count, Index stride, Index length) {
    constexpr Index line = 64 / static_cast<Index>(sizeof(T));
    for (Index i = 0; i < count; ++i)
        for (Index e = 0; e < length; e += line) __builtin_prefetch(rows + i * stride + e, 0, 2);
}

/// The sizes of tiles: queries lie along the lanes of batches, so that the softmax of many rows runs down their keys
/// without a sum across lanes. Groups are the queries that see a block of keys together or not at all.
template <typename T>
struct LocalTile {
    static constexpr Index group = std::max(lanes<T>, Index{8});
    static constexpr Index queries = block_rows == 6 ? 48 : 32, batches = queries / lanes<T>, groups = queries / group;
    static constexpr Index keys = 504;  // at once; a window that is wider comes in turn
    static_assert(queries % group == 0 && queries % block_rows == 0 && keys % block_rows == 0);

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
          last(std::min(head.length, end + head.reach)),
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

/// A tile of queries of one head and what they see. Scores and probabilities are stored key by key: entry (j, i) at
/// (j − key) · Tile::queries + i, where `key` is the first of the keys at hand.
template <typename T>
class LocalQueries {
public:
    /// q points to the row of token `first_query`; rows of queries, outputs and their gradient are `stride` apart.
    LocalQueries(const LocalHead<T>& head, const LocalWindow<T>& window, Index first_query, Index limit, const T* q,
                 Index stride)
        : first(first_query),
          count(std::min(Tile::queries, limit - first_query)),
          begin(std::max(Index{0}, first - head.reach) / block_rows * block_rows),
          end(std::min(head.length, first + count + head.reach)),
          head_(head),
          window_(window),
          q_(q),
          stride_(stride),
          scale_(T(1) / std::sqrt(static_cast<T>(head.dim))) {}

    /// out and log_sum_exp are assigned. What backward needs of it stays at hand if it all fits into one block of keys.
    void forward(T* out, T* log_sum_exp) const {
        const T* const q = transposed<struct Queries>(rows<struct QueryRows>(q_, scale_));
        T* const p = scores();
        T* const sums = thread_scratch<T, struct Sums>(Tile::queries * window_.stride);
        std::array<Batch<T>, Tile::batches> largest, total;
        largest.fill(Batch<T>(-infinity));
        total.fill(Batch<T>(T(0)));
        for (Index key = begin, until; key < end; key = until) {
            until = block_end(key);
            products(window_.k, q, key, until, p);
            alignas(64) std::array<T, Tile::queries> shrink;
            for (Index c = 0; c < Tile::batches; ++c) {
                Batch<T>& top = largest[static_cast<std::size_t>(c)];
                Batch<T>& sum = total[static_cast<std::size_t>(c)];
                const Batch<T> before = top;
                top = hide(-infinity, c, key, until, p, top);
                const Batch<T> shift = finite_or_zero(top), factor = cpu::exp(before - shift);
                store(shrink.data() + c * lanes<T>, factor);
                sum *= factor;
                for_each_key(c, key, until, p, [&](Index, T* entry) {
                    const Batch<T> e = cpu::exp(load(entry) - shift);
                    sum += e;
                    store(entry, e);
                });
                clear_beside(c, key, until, p);
            }
            if (key > begin)
                for (Index i = 0; i < count; ++i)
                    scale_row(sums + i * window_.stride, window_.stride, shrink[static_cast<std::size_t>(i)]);
            combine(key > begin, p, key, until, window_.v, sums);
        }
        for (Index c = 0; c < Tile::batches; ++c) {
            const Batch<T> sum = total[static_cast<std::size_t>(c)];
            const Batch<T> zero(T(0)), one(T(1));
            const Index width = std::clamp(count - c * lanes<T>, Index{0}, lanes<T>);
            T* const factor = inverse_sums() + c * lanes<T>;
            store(factor, xsimd::select(sum > zero, one / sum, zero));
            for (Index i = 0; i < width; ++i) {
                const Index row = c * lanes<T> + i;
                const Batch<T> f(factor[i]);
                for_each_batch<T>(head_.dim, [&](Index e, Index w) {
                    store(out + row * stride_ + e, load(sums + row * window_.stride + e) * f, w);
                });
            }
            store(log_sum_exp + c * lanes<T>, largest[static_cast<std::size_t>(c)] + cpu::log(sum), width);
        }
    }

    /// d_q, whose rows are d_q_stride apart, is assigned; d_k and d_v, which have the layout of the window, are added
    /// to. `after_forward`: what came last on this thread is forward of these queries.
    void backward(bool after_forward, T* d_q, Index d_q_stride, T* d_k, T* d_v, const T* out, const T* d_out,
                  const T* log_sum_exp) const {
        const bool at_hand = after_forward && one_block();
        const Index stride = window_.stride;
        T* const q_rows = rows<struct QueryRows>(q_, scale_);
        T* const d_o_rows = rows<struct OutGradientRows>(d_out, T(1));
        T* const p = scores();
        T* const d_s = thread_scratch<T, struct ScoreGradients>(Tile::keys * Tile::queries);
        T* const sums = thread_scratch<T, struct Sums>(Tile::queries * stride);
        // Rows that saw no key get weights exp(s − ∞) = 0.
        alignas(64) std::array<T, Tile::queries> shift, out_dot;
        shift.fill(infinity);
        out_dot.fill(T(0));
        bool finite = window_.is_finite() && all_finite(q_rows, count * stride) && all_finite(d_o_rows, count * stride);
        for (Index i = 0; i < count; ++i) {
            if (log_sum_exp[i] != -infinity) shift[static_cast<std::size_t>(i)] = log_sum_exp[i];
            out_dot[static_cast<std::size_t>(i)] = dot(out + i * stride_, d_out + i * stride_, head_.dim);
            finite = finite && log_sum_exp[i] < infinity;
        }
        // Where something is not finite: weights of keys that a query does not see are 0 even if its others are NaN,
        // and rows of q and d_out that are not finite become zeros whose weights are NaN.
        for (Index i = 0; i < count && !finite; ++i) {
            const bool row_is_finite =
                all_finite(q_rows + i * stride, stride) && all_finite(d_o_rows + i * stride, stride);
            if (row_is_finite && log_sum_exp[i] < infinity) continue;
            shift[static_cast<std::size_t>(i)] = inverse_sums()[i] = std::numeric_limits<T>::quiet_NaN();
            if (row_is_finite) continue;
            std::fill_n(q_rows + i * stride, stride, T(0));
            std::fill_n(d_o_rows + i * stride, stride, T(0));
        }
        const T* const q = transposed<struct Queries>(q_rows);
        const T* const d_o = transposed<struct OutGradients>(d_o_rows);
        const T hidden = at_hand ? T(0) : -infinity;
        const Batch<T> zero(T(0)), one(T(1));
        for (Index key = begin, until; key < end; key = until) {
            until = block_end(key);
            if (!at_hand) products(window_.k, q, key, until, p);
            products(window_.v, d_o, key, until, d_s);
            for (Index c = 0; c < Tile::batches; ++c) {
                if (!at_hand || !finite) hide(hidden, c, key, until, p, Batch<T>(-infinity));
                const Batch<T> log_sum = load(shift.data() + c * lanes<T>), mean = load(out_dot.data() + c * lanes<T>);
                const Batch<T> inverse_sum = load(inverse_sums() + c * lanes<T>);
                for_each_key(c, key, until, p, [&](Index j, T* entry) {
                    T* const d_entry = d_s + (j - key) * Tile::queries + c * lanes<T>;
                    const Batch<T> score = load(entry);
                    Batch<T> e = at_hand ? score * inverse_sum : cpu::exp(score - log_sum);
                    if (!finite) e = xsimd::select(score == Batch<T>(hidden), zero, e);
                    store(entry, e);
                    // Exactly 0 for what is not seen, whatever stands there, and for all that is seen.
                    store(d_entry, xsimd::select((e == zero) | (e == one), zero, e * (load(d_entry) - mean)));
                });
                clear_beside(c, key, until, d_s);
            }
            combine(key > begin, d_s, key, until, window_.k, sums);
            spread(p, key, until, d_o_rows, d_v);
            spread(d_s, key, until, q_rows, d_k);
        }
        for (Index i = 0; i < count; ++i)
            for_each_batch<T>(head_.dim, [&](Index e, Index width) {
                store(d_q + i * d_q_stride + e, load(sums + i * stride + e) * Batch<T>(scale_), width);
            });
    }

    const Index first, count, begin, end;  // queries, and the keys [begin, end)

private:
    using Tile = LocalTile<T>;
    static constexpr T infinity = std::numeric_limits<T>::infinity();

    /// Whether the keys of any tile fit into one block.
    bool one_block() const { return 2 * head_.reach + Tile::queries + block_rows <= Tile::keys; }
    /// Where the block of keys from `key` on ends: at places that do not depend on the tile, nor does the order of
    /// sums.
    Index block_end(Index key) const { return one_block() ? end : std::min(end, (key / Tile::keys + 1) * Tile::keys); }
    /// Entries (j, i) for a block of keys: forward leaves exp(score − largest) where backward takes it up.
    static T* scores() { return thread_scratch<T, struct Scores>(Tile::keys * Tile::queries); }
    /// One over the sum of exponentials, for each query of the tile.
    static T* inverse_sums() { return thread_scratch<T, struct InverseSums>(Tile::queries); }
    static Batch<T> finite_or_zero(const Batch<T>& x) {
        return xsimd::select(x == Batch<T>(-infinity), Batch<T>(T(0)), x);
    }

    /// factor · rows (Tile::queries, window.stride), with zeros for what is not there
    template <typename Use>
    T* rows(const T* from, T factor) const {
        T* const to = thread_scratch<T, Use>(Tile::queries * window_.stride);
        for (Index i = 0; i < count; ++i)
            for_each_batch<T>(head_.dim, [&](Index e, Index width) {
                store(to + i * window_.stride + e, load(from + i * stride_ + e, width) * Batch<T>(factor));
            });
        std::fill(to + count * window_.stride, to + Tile::queries * window_.stride, T(0));
        return to;
    }
    /// (window.stride, Tile::queries)
    template <typename Use>
    const T* transposed(const T* rows) const {
        T* const to = thread_scratch<T, Use>(window_.stride * Tile::queries);
        cpu::transpose(Tile::queries, window_.stride, rows, window_.stride, to, Tile::queries);
        return to;
    }

    /// The keys in [key, until) that some of the queries [i, i + size) see, and those in whole blocks.
    struct Keys {
        Index begin, end;
    };
    Keys seen_by(Index i, Index size, Index key, Index until) const {
        const Index low = std::max(key, first + i - head_.reach);
        return {low, std::max(low, std::min(until, first + i + size + head_.reach))};
    }
    Keys blocks_seen_by(Index i, Index size, Index key, Index until) const {
        const Keys seen = seen_by(i, size, key, until);
        if (seen.begin == seen.end) return {key, key};
        return {key + (seen.begin - key) / block_rows * block_rows, key + round_up(seen.end - key, block_rows)};
    }

    /// scores (j, ·) = rows[j] · columns for the keys of [key, until), in groups of queries that see them
    void products(const T* rows, const T* columns, Index key, Index until, T* scores) const {
        for (Index j = key; j < until; j += block_rows) {
            const Keys groups = groups_that_see(j);
            rows_product<Op::none>(false, (groups.end - groups.begin) * (Tile::group / lanes<T>), head_.dim,
                                   rows + (j - window_.first) * window_.stride, window_.stride,
                                   columns + groups.begin * Tile::group, Tile::queries,
                                   scores + (j - key) * Tile::queries + groups.begin * Tile::group, Tile::queries);
        }
    }
    /// The groups of queries that see some key of the block from j on.
    Keys groups_that_see(Index j) const {
        const Index low = j - head_.reach - first, high = j + block_rows - 1 + head_.reach - first;
        const Index begin_group = std::clamp(low / Tile::group, Index{0}, Tile::groups);
        return {begin_group, std::clamp(high / Tile::group + 1, begin_group, Tile::groups)};
    }

    /// body(j, entry) for the entries of a batch of queries, in all blocks that its group sees
    template <typename Body>
    void for_each_key(Index c, Index key, Index until, T* scores, Body&& body) const {
        const Keys seen = blocks_seen_by(c * lanes<T> / Tile::group * Tile::group, Tile::group, key, until);
        T* entry = scores + (seen.begin - key) * Tile::queries + c * lanes<T>;
        for (Index j = seen.begin; j < seen.end; ++j, entry += Tile::queries) body(j, entry);
    }
    /// Scores that do not count become `value`, and those of keys and values that are not finite NaN. Returns the
    /// larger of `top` and the scores.
    Batch<T> hide(T value, Index c, Index key, Index until, T* scores, Batch<T> top) const {
        alignas(64) std::array<T, static_cast<std::size_t>(lanes<T>)> positions;
        for (Index i = 0; i < lanes<T>; ++i) positions[static_cast<std::size_t>(i)] = static_cast<T>(i);
        const Batch<T> lane = load(positions.data()), hidden(value);
        const Index query = first + c * lanes<T>;
        for_each_key(c, key, until, scores, [&](Index j, T* entry) {
            const Index low = j - head_.reach - query, high = j + head_.reach - query;  // lanes that see key j
            Batch<T> score = load(entry);
            if (window_.is_nonfinite(j)) store(entry, score = Batch<T>(std::numeric_limits<T>::quiet_NaN()));
            if (j >= until || (head_.mask && !head_.mask[j])) {
                store(entry, score = hidden);
            } else if (low > 0 || high < lanes<T> - 1) {
                const auto clamped = [](Index i) {
                    return Batch<T>(static_cast<T>(std::clamp(i, Index{-1}, lanes<T>)));
                };
                score = xsimd::select(lane < clamped(low), hidden, score);
                store(entry, score = xsimd::select(lane > clamped(high), hidden, score));
            }
            top = xsimd::max(top, score);
        });
        return top;
    }

    /// Zeros for a batch of queries where `combine` reads what its group does not see and others of a block do.
    void clear_beside(Index c, Index key, Index until, T* weights) const {
        const Index i = c * lanes<T> / Tile::group * Tile::group, block = i / block_rows * block_rows;
        const Keys written = blocks_seen_by(i, Tile::group, key, until);
        const Keys read = seen_by(block, round_up(i + Tile::group, block_rows) - block, key, until);
        const auto clear = [&](Index j) { store(weights + (j - key) * Tile::queries + c * lanes<T>, Batch<T>(T(0))); };
        for (Index j = read.begin; j < std::min(read.end, written.begin); ++j) clear(j);
        for (Index j = std::max(read.begin, written.end); j < read.end; ++j) clear(j);
    }

    /// sums (i, ·) = or += Σ_j weights (j, i) rows[j] over the keys of [key, until)
    void combine(bool add, const T* weights, Index key, Index until, const T* rows, T* sums) const {
        for (Index i = 0; i < Tile::queries; i += block_rows) {
            const Keys seen = seen_by(i, block_rows, key, until);
            rows_product<Op::transpose>(add, window_.stride / lanes<T>, seen.end - seen.begin,
                                        weights + (seen.begin - key) * Tile::queries + i, Tile::queries,
                                        rows + (seen.begin - window_.first) * window_.stride, window_.stride,
                                        sums + i * window_.stride, window_.stride);
        }
    }
    /// sums (j, ·) += Σ_i weights (j, i) rows[i]
    void spread(const T* weights, Index key, Index until, const T* rows, T* sums) const {
        for (Index j = key; j < until; j += block_rows) {
            const Keys groups = groups_that_see(j);
            rows_product<Op::none>(true, window_.stride / lanes<T>, (groups.end - groups.begin) * Tile::group,
                                   weights + (j - key) * Tile::queries + groups.begin * Tile::group, Tile::queries,
                                   rows + groups.begin * Tile::group * window_.stride, window_.stride,
                                   sums + (j - window_.first) * window_.stride, window_.stride);
        }
    }

    const LocalHead<T>& head_;
    const LocalWindow<T>& window_;
    const T* q_;
    Index stride_;
    T scale_;
};

/// to = row, or to += row
template <typename T>
void copy_row(bool add, const T* row, Index dim, T* to) {
    for_each_batch<T>(dim, [&](Index e, Index width) {
        const Batch<T> x = load(row + e, width);
        store(to + e, add ? load(to + e, width) + x : x, width);
    });
}

/// Queries that one task goes along with their window at hand. Does not depend on the number of threads. Windows of two
/// segments that are not neighbours do not meet.
template <typename T>
Index local_segment(Index reach, Index queries) {
    return round_up(std::max(Index{512}, 2 * std::min(reach, queries)), LocalTile<T>::queries);
}

/// The tokens [begin, end) of the three windows around token i; `out_of_grid` counts the slots of whole windows beyond
/// the sequence, whose values the reference sets to −1.
struct WindowSlots {
    WindowSlots(Index i, Index window, Index length) {
        const Index first = (i / window - 1) * window, last = (i / window + 2) * window;
        const Index grid = (length + window - 1) / window * window;
        begin = std::max(Index{0}, first);
        end = std::min(length, last);
        out_of_grid = std::max(Index{0}, -first) + std::max(Index{0}, last - grid);
    }
    Index begin, end, out_of_grid;
};

/// MaskedRows::window_mean for a token that saw no key. What is not finite counts as 0 in masked tokens.
template <typename T>
void window_mean(const LocalHead<T>& head, Index window, Index i, T* out) {
    const WindowSlots slots(i, window, head.length);
    std::fill_n(out, head.dim, -static_cast<T>(slots.out_of_grid));
    for (Index j = slots.begin; j < slots.end; ++j)
        for (Index e = 0; e < head.dim; ++e) {
            const T v = head.v[j * head.stride + e];
            out[e] += std::isfinite(v) || head.mask == nullptr || head.mask[j] ? v : T(0);
        }
    for (Index e = 0; e < head.dim; ++e) out[e] /= static_cast<T>(3 * window);
}

/// What such tokens of [first, last) add to the gradient of value j; row i of d_out and entry i of log_sum_exp are
/// those of token first + i. Windows are neighbours of each other in both directions: the tokens whose mean counts j
/// are those of the windows around j.
template <typename T>
void add_window_mean_gradient(const LocalHead<T>& head, Index window, Index j, Index first, Index last, const T* d_out,
                              Index stride, const T* log_sum_exp, T* d_v) {
    const WindowSlots slots(j, window, head.length);
    for (Index i = std::max(first, slots.begin) - first; i < std::min(last, slots.end) - first; ++i)
        if (log_sum_exp[i] == -std::numeric_limits<T>::infinity())
            for (Index e = 0; e < head.dim; ++e) d_v[e] += d_out[i * stride + e] / static_cast<T>(3 * window);
}

/// Forward of a tile of queries, whose rows of outputs are `stride` apart.
template <typename T>
void attend(const LocalAttention& attention, const LocalHead<T>& head, const LocalQueries<T>& queries, T* out,
            Index stride, T* log_sum_exp) {
    queries.forward(out, log_sum_exp);
    if (attention.masked_rows == MaskedRows::zero) return;
    for (Index i = 0; i < queries.count; ++i)
        if (log_sum_exp[i] == -std::numeric_limits<T>::infinity())
            window_mean(head, attention.reach, queries.first + i, out + i * stride);
}

}  // namespace cpu

template <typename T>
void local_attention_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic> out,
                            TokensView<T> log_sum_exp, View<const T, dynamic, dynamic, dynamic, dynamic> q,
                            View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> kv, Mask mask, Index first,
                            const LocalAttention& attention) {
    const Index batch = q.extent(0), queries = q.extent(1), heads = q.extent(2), row = heads * q.extent(3);
    constexpr Index tile = cpu::LocalTile<T>::queries;
    const Index segment = cpu::local_segment<T>(attention.reach, queries), limit = first + queries;
    const Index segments = divide_up(queries, segment);
    parallel_for(policy, batch * segments * heads, [&](Index task) {
        const Index b = task / (heads * segments), h = task / segments % heads;
        const Index begin = first + task % segments * segment, end = std::min(limit, begin + segment);
        const cpu::LocalHead<T> head(kv, mask, b, h, attention.reach);
        const cpu::LocalWindow<T> window(head, begin, end);
        for (Index i = begin; i < end; i += tile) {
            T kept[std::size_t{tile}];
            T* const log_sum = log_sum_exp ? &log_sum_exp(b, h, i - first) : kept;
            const cpu::LocalQueries<T> rows(head, window, i, end, &q(b, i - first, h, 0), row);
            if (i + tile < end)
                cpu::prefetch_rows(&q(b, i + tile - first, h, 0), std::min(tile, end - i - tile), row, head.dim);
            cpu::attend(attention, head, rows, &out(b, i - first, h, 0), row, log_sum);
        }
    });
}

namespace cpu {

/// The gradients of queries, keys and values, as local_attention_vjp says. `again`: out and log_sum_exp are computed on
/// the way, where what backward needs of it is at hand; otherwise they are read.
template <bool again, typename T, typename Out, typename LogSumExp>
void local_attention_gradients(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic> d_qkv,
                               View<const T, dynamic, dynamic, dynamic, dynamic> d_out, const Out& out,
                               const LogSumExp& log_sum_exp, View<const T, dynamic, dynamic, dynamic, dynamic> q,
                               View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> kv, Mask mask, Index first,
                               const LocalAttention& attention) {
    const Index batch = q.extent(0), queries = q.extent(1), heads = q.extent(2), dim = q.extent(3);
    constexpr Index tile = LocalTile<T>::queries;
    const Index segment = local_segment<T>(attention.reach, queries), limit = first + queries;
    const Index segments = divide_up(queries, segment);
    // Row j of d_qkv is that of token origin + j.
    const Index origin = attention.window_begin(first);
    const Index row = heads * dim, d_row = 3 * row;
    const auto d_token = [&](Index b, Index j, Index h) { return &d_qkv(b, j - origin, 0, h, 0); };
    const auto earlier_part_reached = [&](Index j) { return first > 0 && j < first + attention.halo(); };
    // Each segment marches along its queries and sums the gradients of the keys and values around them. Those of one
    // colour are far enough apart not to meet, so that no sum depends on the order of threads: the first colour
    // assigns, the second adds where it meets the first.
    for (Index colour = 0; colour < 2; ++colour) {
        const Index of_colour = (segments + 1 - colour) / 2;
        parallel_for(policy, batch * of_colour * heads, [&](Index task) {
            const Index b = task / (heads * of_colour), h = task / of_colour % heads;
            const Index begin = first + (2 * (task % of_colour) + colour) * segment;
            const Index end = std::min(limit, begin + segment);
            const LocalHead<T> head(kv, mask, b, h, attention.reach);
            const LocalWindow<T> window(head, begin, end);
            T* const d_k = thread_scratch<T, struct KeyGradients>(window.rows * window.stride);
            T* const d_v = thread_scratch<T, struct ValueGradients>(window.rows * window.stride);
            std::fill_n(d_k, window.rows * window.stride, T(0));
            std::fill_n(d_v, window.rows * window.stride, T(0));
            for (Index i = begin; i < end; i += tile) {
                if (i + tile < end) {
                    const Index next = i + tile - first, count = std::min(tile, end - i - tile);
                    prefetch_rows(&q(b, next, h, 0), count, row, dim);
                    prefetch_rows(&d_out(b, next, h, 0), count, row, dim);
                    if (!again) prefetch_rows(&out(b, next, h, 0), count, row, dim);
                }
                const LocalQueries<T> rows(head, window, i, end, &q(b, i - first, h, 0), row);
                if constexpr (again)
                    attend(attention, head, rows, &out(b, i - first, h, 0), row, &log_sum_exp(b, h, i - first));
                rows.backward(again, d_token(b, i, h), d_row, d_k, d_v, &out(b, i - first, h, 0),
                              &d_out(b, i - first, h, 0), &log_sum_exp(b, h, i - first));
            }
            for (Index j = std::max(Index{0}, begin - head.reach); j < window.last; ++j) {
                const bool met = colour == 1 && (j < begin + head.reach || (end < limit && j >= end - head.reach));
                const bool add = met || earlier_part_reached(j);
                copy_row(add, d_k + (j - window.first) * window.stride, dim, d_token(b, j, h) + row);
                copy_row(add, d_v + (j - window.first) * window.stride, dim, d_token(b, j, h) + 2 * row);
            }
        });
    }
    if (attention.masked_rows == MaskedRows::zero) return;
    parallel_for(policy, batch * d_qkv.extent(1) * heads, [&](Index task) {
        const Index b = task / (d_qkv.extent(1) * heads), h = task % heads;
        const Index j = origin + task / heads % d_qkv.extent(1);
        T* const d_k = d_token(b, j, h) + row;
        T* const d_v = d_k + row;
        if (j >= limit + attention.reach && !earlier_part_reached(j)) {  // within the halo, but out of reach
            std::fill_n(d_k, dim, T(0));
            std::fill_n(d_v, dim, T(0));
        }
        if (!mask) return;
        add_window_mean_gradient(LocalHead<T>(kv, mask, b, h, attention.reach), attention.reach, j, first, limit,
                                 &d_out(b, 0, h, 0), row, &log_sum_exp(b, h, 0), d_v);
    });
}

}  // namespace cpu

template <typename T>
void local_attention_vjp_kernel(const Cpu& policy, View<T, dynamic, dynamic, dynamic, dynamic, dynamic> d_qkv,
                                View<const T, dynamic, dynamic, dynamic, dynamic> d_out,
                                View<const T, dynamic, dynamic, dynamic, dynamic> out, TokensView<const T> log_sum_exp,
                                View<const T, dynamic, dynamic, dynamic, dynamic> q,
                                View<const T, dynamic, dynamic, dynamic, dynamic, dynamic> kv, Mask mask, Index first,
                                const LocalAttention& attention) {
    cpu::local_attention_gradients<false>(policy, d_qkv, d_out, out, log_sum_exp, q, kv, mask, first, attention);
}

}  // namespace colt5
