// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <type_traits>

#include <colt5/cpu/local_bias.hpp>
#include <colt5/cpu/local_window.hpp>

/// Local attention: a tile of queries, forward and backward.
namespace colt5::cpu {

/// A tile of queries of one head and what they see. Scores and probabilities are stored key by key: entry (j, i) at
/// (j − key) · Tile::queries + i, where `key` is the first key of the block. Bias is LocalBias<T> or NoBias.
template <typename T, typename Bias = NoBias>
class LocalQueries {
public:
    /// q points to the row of token `first_query`; rows of queries, outputs and their gradient are `stride` apart.
    LocalQueries(const LocalHead<T>& head, const LocalWindow<T>& window, const Bias& bias, Index first_query,
                 Index limit, const T* q, Index stride)
        : first(first_query),
          count(std::min(Tile::queries, limit - first_query)),
          begin(std::max(Index{0}, first - head.reach) / block_rows * block_rows),
          end(std::min(head.length, first + count + head.ahead)),
          head_(head),
          window_(window),
          bias_(bias),
          q_(q),
          stride_(stride),
          scale_(T(1) / std::sqrt(static_cast<T>(head.dim))) {}

    /// out and log_sum_exp are assigned. If all keys fit into one block, the exponentials stay in the scratch of the
    /// thread for backward(after_forward = true) to read.
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
                top = hide<has_bias>(-infinity, c, key, until, p, top);
                const Batch<T> shift = finite_or_zero(top), factor = cpu::exp(before - shift);
                store(shrink.data() + c * lanes<T>, factor);
                sum *= factor;
                for_each_key(c, key, until, p, [&](Index, T* entry) {
                    const Batch<T> e = cpu::exp(load(entry) - shift);
                    sum += e;
                    store(entry, e);
                });
                clear_unseen(c, key, until, p);
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

    /// After forward: query i also attends to `keys` keys and values of 0. Corrects its output, its log-sum-exp, and
    /// what backward(after_forward = true) reads.
    void attend_to_zeros(Index i, T keys, T* out, T& log_sum_exp) const {
        const T largest = std::max(log_sum_exp, T(0));
        const T sum = largest + std::log(std::exp(log_sum_exp - largest) + keys * std::exp(-largest));
        const Batch<T> share(std::exp(log_sum_exp - sum));
        for_each_batch<T>(head_.dim,
                          [&](Index e, Index width) { store(out + e, load(out + e, width) * share, width); });
        inverse_sums()[i] *= share.get(0);
        log_sum_exp = sum;
    }

    /// d_q, whose rows are d_q_stride apart, is assigned; d_k and d_v, which have the layout of the window, are added
    /// to, and so is d_bias if there is one. `after_forward`: the last calls on this thread were forward of these
    /// queries, and attend_to_zeros for them if needed.
    template <typename BiasGradient>
    void backward(bool after_forward, T* d_q, Index d_q_stride, T* d_k, T* d_v, const BiasGradient& d_bias,
                  const T* out, const T* d_out, const T* log_sum_exp) const {
        const bool has_exponentials = after_forward && one_block();
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
        // If something is not finite, a query whose row of q or d_out is not finite gets NaN weights for the keys that
        // it sees and 0 for the others. Its rows become zeros, so that no 0 · NaN reaches the gradient of another key.
        // A query whose log-sum-exp is NaN or +∞ gets such weights, too; its rows stay if they are finite.
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
        // Marks a hidden key: among scores by −∞, which a key that is seen has only if its score overflows; among
        // exponentials by −1, for that of a key that is seen may be 0.
        const T hidden = has_exponentials ? T(-1) : -infinity;
        const Batch<T> zero(T(0)), one(T(1));
        for (Index key = begin, until; key < end; key = until) {
            until = block_end(key);
            if (!has_exponentials) products(window_.k, q, key, until, p);
            products(window_.v, d_o, key, until, d_s);
            for (Index c = 0; c < Tile::batches; ++c) {
                if (!has_exponentials)
                    hide<has_bias>(hidden, c, key, until, p, Batch<T>(-infinity));
                else if (!finite)
                    hide<false>(hidden, c, key, until, p, Batch<T>(-infinity));
                const Batch<T> log_sum = load(shift.data() + c * lanes<T>), mean = load(out_dot.data() + c * lanes<T>);
                const Batch<T> inverse_sum = load(inverse_sums() + c * lanes<T>);
                for_each_key(c, key, until, p, [&](Index j, T* entry) {
                    T* const d_entry = d_s + (j - key) * Tile::queries + c * lanes<T>;
                    const Batch<T> score = load(entry);
                    Batch<T> e = has_exponentials ? score * inverse_sum : cpu::exp(score - log_sum);
                    if (!finite) e = xsimd::select(score == Batch<T>(hidden), zero, e);
                    store(entry, e);
                    // Exactly 0 where the weight is 0, since d_entry may hold anything there, and where it is 1: the
                    // softmax of a single key is constant.
                    const Batch<T> d_score = xsimd::select((e == zero) | (e == one), zero, e * (load(d_entry) - mean));
                    store(d_entry, d_score);
                    if constexpr (has_bias) d_bias.add(c * lanes<T>, j - first, d_score);
                });
                clear_unseen(c, key, until, d_s);
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

    const Index first, count, begin, end;  // queries [first, first + count), keys [begin, end)

private:
    using Tile = LocalTile<T>;
    static constexpr bool has_bias = !std::is_same_v<Bias, NoBias>;
    static constexpr T infinity = std::numeric_limits<T>::infinity();

    bool one_block() const { return Tile::one_block(head_.reach, head_.ahead); }
    /// The end of the block of keys that begins at `key`. Where one block does not hold all keys, blocks end at
    /// multiples of Tile::keys wherever the tile is, so that sums have the same order.
    Index block_end(Index key) const { return one_block() ? end : std::min(end, (key / Tile::keys + 1) * Tile::keys); }
    /// Entries (j, i) for a block of keys: forward leaves exp(score − largest) there for backward.
    static T* scores() { return thread_scratch<T, struct Scores>(Tile::keys * Tile::queries); }
    /// One over the sum of exponentials, for each query of the tile.
    static T* inverse_sums() { return thread_scratch<T, struct InverseSums>(Tile::queries); }
    static Batch<T> finite_or_zero(const Batch<T>& x) {
        return xsimd::select(x == Batch<T>(-infinity), Batch<T>(T(0)), x);
    }

    /// factor · rows (Tile::queries, window.stride), with zeros behind the last query and the last column
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

    struct Range {
        Index begin, end;
    };
    /// The keys in [key, until) that some query of [i, i + size) sees.
    Range seen_by(Index i, Index size, Index key, Index until) const {
        const Index low = std::max(key, first + i - head_.reach);
        return {low, std::max(low, std::min(until, first + i + size + head_.ahead))};
    }
    /// The same, widened to whole blocks of block_rows keys.
    Range blocks_seen_by(Index i, Index size, Index key, Index until) const {
        const Range seen = seen_by(i, size, key, until);
        if (seen.begin == seen.end) return {key, key};
        return {key + (seen.begin - key) / block_rows * block_rows, key + round_up(seen.end - key, block_rows)};
    }

    /// scores (j, ·) = rows[j] · columns for the keys of [key, until), in groups of queries that see them
    void products(const T* rows, const T* columns, Index key, Index until, T* scores) const {
        for (Index j = key; j < until; j += block_rows) {
            const Range groups = groups_that_see(j);
            rows_product<Op::none>(false, (groups.end - groups.begin) * (Tile::group / lanes<T>), head_.dim,
                                   rows + (j - window_.first) * window_.stride, window_.stride,
                                   columns + groups.begin * Tile::group, Tile::queries,
                                   scores + (j - key) * Tile::queries + groups.begin * Tile::group, Tile::queries);
        }
    }
    /// The groups of queries that see some key of the block from j on.
    Range groups_that_see(Index j) const {
        const Index low = j - head_.ahead - first, high = j + block_rows - 1 + head_.reach - first;
        const Index begin_group = std::clamp(low / Tile::group, Index{0}, Tile::groups);
        return {begin_group, std::clamp(high / Tile::group + 1, begin_group, Tile::groups)};
    }

    /// body(j, entry) for the entries of a batch of queries, in all blocks that its group sees
    template <typename Body>
    void for_each_key(Index c, Index key, Index until, T* scores, Body&& body) const {
        const Range seen = blocks_seen_by(c * lanes<T> / Tile::group * Tile::group, Tile::group, key, until);
        T* entry = scores + (seen.begin - key) * Tile::queries + c * lanes<T>;
        for (Index j = seen.begin; j < seen.end; ++j, entry += Tile::queries) body(j, entry);
    }
    /// With `add_bias`, first adds the bias. Then the score of each key that is out of reach, or masked, or at `until`
    /// or later becomes `value`, and that of each other key whose key or value vector is not finite becomes NaN.
    /// Returns the maximum of `top` and the scores.
    template <bool add_bias>
    Batch<T> hide(T value, Index c, Index key, Index until, T* scores, Batch<T> top) const {
        alignas(64) std::array<T, static_cast<std::size_t>(lanes<T>)> positions;
        for (Index i = 0; i < lanes<T>; ++i) positions[static_cast<std::size_t>(i)] = static_cast<T>(i);
        const Batch<T> lane = load(positions.data()), hidden(value);
        const Index query = first + c * lanes<T>;
        for_each_key(c, key, until, scores, [&](Index j, T* entry) {
            const Index low = j - head_.ahead - query, high = j + head_.reach - query;  // lanes that see key j
            Batch<T> score = load(entry);
            if constexpr (add_bias) store(entry, score += bias_.at(query - j));
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

    /// `combine` reads the weights of block_rows queries at once, for every key that one of them sees. This clears
    /// those of batch c that its own group does not see, which nothing has written.
    void clear_unseen(Index c, Index key, Index until, T* weights) const {
        const Index i = c * lanes<T> / Tile::group * Tile::group, block = i / block_rows * block_rows;
        const Range written = blocks_seen_by(i, Tile::group, key, until);
        const Range read = seen_by(block, round_up(i + Tile::group, block_rows) - block, key, until);
        const auto clear = [&](Index j) { store(weights + (j - key) * Tile::queries + c * lanes<T>, Batch<T>(T(0))); };
        for (Index j = read.begin; j < std::min(read.end, written.begin); ++j) clear(j);
        for (Index j = std::max(read.begin, written.end); j < read.end; ++j) clear(j);
    }

    /// sums (i, ·) = or += Σ_j weights (j, i) rows[j] over the keys of [key, until)
    void combine(bool add, const T* weights, Index key, Index until, const T* rows, T* sums) const {
        for (Index i = 0; i < Tile::queries; i += block_rows) {
            const Range seen = seen_by(i, block_rows, key, until);
            rows_product<Op::transpose>(add, window_.stride / lanes<T>, seen.end - seen.begin,
                                        weights + (seen.begin - key) * Tile::queries + i, Tile::queries,
                                        rows + (seen.begin - window_.first) * window_.stride, window_.stride,
                                        sums + i * window_.stride, window_.stride);
        }
    }
    /// sums (j, ·) += Σ_i weights (j, i) rows[i]
    void spread(const T* weights, Index key, Index until, const T* rows, T* sums) const {
        for (Index j = key; j < until; j += block_rows) {
            const Range groups = groups_that_see(j);
            rows_product<Op::none>(true, window_.stride / lanes<T>, (groups.end - groups.begin) * Tile::group,
                                   weights + (j - key) * Tile::queries + groups.begin * Tile::group, Tile::queries,
                                   rows + groups.begin * Tile::group * window_.stride, window_.stride,
                                   sums + (j - window_.first) * window_.stride, window_.stride);
        }
    }

    const LocalHead<T>& head_;
    const LocalWindow<T>& window_;
    const Bias& bias_;
    const T* q_;
    Index stride_;
    T scale_;
};

}  // namespace colt5::cpu
