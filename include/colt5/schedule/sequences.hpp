// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <colt5/core/tensor.hpp>
#include <colt5/core/view.hpp>
#include <colt5/op/copy_sequences.hpp>
#include <colt5/op/zero.hpp>

/// Batches of sequences of different lengths: which rows are whose, and in which order sequences are computed.
namespace colt5 {

/// Cumulative lengths (0, n_0, n_0 + n_1, …), one number more than there are sequences.
inline std::vector<Index> cumulative_lengths(std::span<const Index> lengths) {
    std::vector<Index> sums{0};
    for (const Index length : lengths) sums.push_back(sums.back() + length);
    return sums;
}

/// The number of real tokens of each sequence of a mask (b, n). The host waits for the mask. Throws ValueError where a
/// masked token comes before a real one.
template <Policy P>
std::vector<Index> lengths_of(const P& policy, Mask mask) {
    const auto size = static_cast<std::size_t>(mask.size());
    const auto real = std::make_unique<bool[]>(size);
    download(policy, real.get(), mask.data(), size);
    std::vector<Index> lengths;
    for (Index b = 0; b < mask.extent(0); ++b) {
        const bool *const first = real.get() + b * mask.extent(1), *const last = first + mask.extent(1);
        const bool *const end = std::find(first, last, false), *const hole = std::find(end, last, true);
        if (hole != last)
            expect_value(false, "mask",
                         detail::concat({"false behind its first masked token, (", value_string(b), ", ",
                                         value_string(end - first), ")"}),
                         detail::concat({"true at (", value_string(b), ", ", value_string(hole - first), ")"}));
        lengths.push_back(end - first);
    }
    return lengths;
}

/// Sequences of one length: a batch (count, length, d) that one call computes. The spans are of a SequencePlan.
struct SequenceGroup {
    Index length = 0;
    std::span<const Index> numbers{}, first_rows{};  // of each sequence: its number, and where it begins
    bool contiguous = true;                          // whether they follow each other in memory

    Index count() const { return static_cast<Index>(numbers.size()); }
    Index rows() const { return count() * length; }

    /// Its part of all rows (rows, d) as (count, length, d): a view of them, or if they do not follow each other, of a
    /// copy that `copy` owns.
    template <Policy P, typename T>
    TokensView<const T> of(const P& policy, const MatrixView<const T>& all, TokensTensor<T, P>& copy) const {
        const std::array shape{count(), length, all.extent(1)};
        if (contiguous) return all.range(first_rows.front(), rows()).reshape(shape);
        copy = {policy, shape};
        gather_sequences(policy, copy.view(), all, first_rows);
        return copy.const_view();
    }
};

/// Where the sequences are in tokens that are packed, (total, d), or padded behind their real tokens, (b, n, d).
class SequenceRows {
public:
    /// `numbers` are the cumulative lengths of packed tokens, or the lengths of padded ones; the object keeps a view of
    /// them. Throws a ValueError that calls them cu_seqlens or lengths, behind `prefix`, if they do not fit the shape
    /// of the tokens.
    template <std::size_t rank>
    SequenceRows(const char* prefix, std::span<const Index> numbers, const std::array<Index, rank>& shape)
        : numbers_(numbers), stride_(rank == 2 ? packed : shape[1]) {
        static_assert(rank == 2 || rank == 3, "colt5: ragged tokens are packed (total, d) or padded (b, n, d)");
        if constexpr (rank == 2)
            expect_cumulative(detail::concat({prefix, "cu_seqlens"}), shape[0]);
        else
            expect_lengths(detail::concat({prefix, "lengths"}), shape[0]);
    }

    Index size() const { return static_cast<Index>(numbers_.size()) - (stride_ == packed ? 1 : 0); }
    Index length(Index i) const { return stride_ == packed ? at(i + 1) - at(i) : at(i); }
    Index row(Index i) const { return stride_ == packed ? at(i) : i * stride_; }

private:
    static constexpr Index packed = -1;

    Index at(Index i) const { return numbers_[static_cast<std::size_t>(i)]; }

    static std::string element(const std::string& argument, Index i) {
        return detail::concat({argument, "[", value_string(i), "]"});
    }
    void expect_cumulative(const std::string& argument, Index rows) const {
        expect_value(!numbers_.empty(), argument, "one number more than there are sequences", "empty");
        const auto last = static_cast<Index>(numbers_.size()) - 1;
        if (at(0) != 0) expect_value(false, element(argument, 0), "0", at(0));
        for (Index i = 1; i <= last; ++i)
            if (at(i) < at(i - 1))
                expect_value(false, element(argument, i),
                             detail::concat({">= ", element(argument, i - 1), " = ", value_string(at(i - 1))}), at(i));
        if (at(last) != rows)
            expect_value(false, element(argument, last), detail::concat({"the number of tokens, ", value_string(rows)}),
                         at(last));
    }
    void expect_lengths(const std::string& argument, Index batch) const {
        if (size() != batch)
            expect_value(false, argument, detail::concat({"one number a sequence, ", value_string(batch)}), size());
        for (Index i = 0; i < batch; ++i)
            if (at(i) < 0 || at(i) > stride_)
                expect_value(false, element(argument, i),
                             detail::concat({"between 0 and the padded length, ", value_string(stride_)}), at(i));
    }

    std::span<const Index> numbers_;
    Index stride_;  // rows between the beginnings of two padded sequences
};

/// Groups the sequences of a batch by length. Where a batch has several sides, such as x and a context, all sequences
/// of a group have the same length of x and the same length of context. Sequences that are empty on the first side are
/// in no group. Within a group, sequences are in ascending order; groups are in the order of their first sequences.
/// Made again for as many sequences, it allocates no memory.
template <std::size_t sides>
class SequencePlan {
public:
    /// `rows` say where the sequences are on each side. Every side must have the same number of sequences.
    template <std::same_as<SequenceRows>... Rows>
    void make(const Rows&... rows) {
        static_assert(sizeof...(Rows) == sides);
        const std::array<const SequenceRows*, sides> of_side{&rows...};
        const auto length = [&](std::size_t side, Index i) { return of_side[side]->length(i); };
        const auto count = static_cast<std::size_t>(of_side[0]->size());
        numbers_.clear();
        numbers_.reserve(count);
        groups_.clear();
        groups_.reserve(count);
        for (Index i = 0; i < of_side[0]->size(); ++i)
            if (length(0, i) > 0) numbers_.push_back(i);
        std::sort(numbers_.begin(), numbers_.end(), [&](Index a, Index b) {
            for (std::size_t side = 0; side < sides; ++side)
                if (length(side, a) != length(side, b)) return length(side, a) < length(side, b);
            return a < b;
        });
        for (std::size_t side = 0; side < sides; ++side) {
            first_rows_[side].clear();
            first_rows_[side].reserve(count);
            for (const Index i : numbers_) first_rows_[side].push_back(of_side[side]->row(i));
        }
        for (std::size_t at = 0; at < numbers_.size(); ++at) {
            Group of_this{at, 0, {}};
            for (std::size_t side = 0; side < sides; ++side) of_this.lengths[side] = length(side, numbers_[at]);
            if (groups_.empty() || groups_.back().lengths != of_this.lengths) groups_.push_back(of_this);
            ++groups_.back().count;
        }
        std::sort(groups_.begin(), groups_.end(),
                  [&](const Group& a, const Group& b) { return numbers_[a.begin] < numbers_[b.begin]; });
    }

    std::size_t size() const { return groups_.size(); }
    SequenceGroup group(std::size_t i, std::size_t side = 0) const {
        const auto& [begin, count, lengths] = groups_[i];
        SequenceGroup group{lengths[side], std::span(numbers_).subspan(begin, count),
                            std::span(first_rows_[side]).subspan(begin, count)};
        for (std::size_t at = 1; at < count; ++at)
            group.contiguous = group.contiguous && group.first_rows[at] == group.first_rows[at - 1] + lengths[side];
        return group;
    }
    /// The number of rows of all groups on one side.
    Index rows(std::size_t side = 0) const {
        Index sum = 0;
        for (const Group& group : groups_) sum += static_cast<Index>(group.count) * group.lengths[side];
        return sum;
    }

private:
    struct Group {
        std::size_t begin, count;
        std::array<Index, sides> lengths;
    };

    std::vector<Index> numbers_;
    std::array<std::vector<Index>, sides> first_rows_;
    std::vector<Group> groups_;
};

/// A tensor of tokens, packed or padded, that is written group by group.
template <typename Tensor>
class RowsOfGroups {
    using P = typename Tensor::PolicyType;
    using T = typename Tensor::value_type;

public:
    /// `written` is the number of rows of all groups. If the tensor has others (padding, or tokens of sequences that
    /// are in no group), the whole tensor becomes 0 first.
    RowsOfGroups(const P& policy, const typename Tensor::Shape& shape, Index written)
        : policy_(policy), tensor_(policy, shape), rows_(tensor_.view().rows()) {
        if (written < rows_.extent(0)) set_zero(policy, tensor_);
    }

    /// Where a call writes the rows of a group, (count, length, d): an adopted tensor, which is their place, or if the
    /// sequences do not follow each other, a tensor of its own.
    TokensTensor<T, P> part(const SequenceGroup& group) {
        const std::array shape{group.count(), group.length, rows_.extent(1)};
        if (!group.contiguous) return {policy_, shape};
        return TokensTensor<T, P>::adopt(rows_.range(group.first_rows.front(), group.rows()).data(), shape);
    }
    /// Puts what a call has written to a part where it belongs.
    void put(const SequenceGroup& group, const TokensTensor<T, P>& part) {
        if (!group.contiguous) scatter_sequences(policy_, rows_, part.const_view(), group.first_rows);
    }
    Tensor finish() { return std::move(tensor_); }

private:
    const P& policy_;
    Tensor tensor_;
    MatrixView<T> rows_;
};

}  // namespace colt5
