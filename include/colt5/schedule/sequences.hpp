// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <colt5/core/tensor.hpp>
#include <colt5/core/view.hpp>
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

/// Sequences of one length that follow each other in memory: a batch (count, length, d) that one call computes.
struct SequenceRun {
    Index first, count, length;  // the number of the first sequence, how many there are, and how long each is
    Index first_row;

    Index rows() const { return count * length; }
    /// Its part of all rows (rows, d): (count, length, d).
    template <typename T>
    TokensView<T> of(const MatrixView<T>& all) const {
        return all.range(first_row, rows()).reshape(std::array{count, length, all.extent(1)});
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

    /// Whether sequence i > 0 is as long as the one before it, and begins where that ends.
    bool continues(Index i) const { return length(i) == length(i - 1) && row(i) == row(i - 1) + length(i - 1); }
    SequenceRun run(Index first, Index count) const { return {first, count, length(first), row(first)}; }

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

/// Calls f(run, runs of the others...) for as few runs as there are, in order. Each run has the same sequences of all,
/// which are as many.
template <typename F, typename... Others>
void each_run(F&& f, const SequenceRows& sequences, const Others&... others) {
    for (Index i = 0, count = 1; i < sequences.size(); i += count, count = 1) {
        while (i + count < sequences.size() && sequences.continues(i + count) && (others.continues(i + count) && ...))
            ++count;
        f(sequences.run(i, count), others.run(i, count)...);
    }
}

/// A tensor of tokens, packed or padded, that is written run by run, in order. Rows of no run become 0.
template <typename Tensor>
class RowsInOrder {
    using P = typename Tensor::PolicyType;
    using T = typename Tensor::value_type;

public:
    RowsInOrder(const P& policy, const typename Tensor::Shape& shape)
        : policy_(policy), tensor_(policy, shape), rows_(tensor_.view().rows()) {}

    /// The rows of the next run (count, length, d), which the caller writes: an adopted tensor.
    TokensTensor<T, P> next(const SequenceRun& run) {
        zero_until(run.first_row);
        written_ += run.rows();
        const auto part = run.of(rows_);
        return TokensTensor<T, P>::adopt(part.data(), part.shape());
    }
    Tensor finish() {
        zero_until(rows_.extent(0));
        return std::move(tensor_);
    }

private:
    void zero_until(Index row) {
        auto gap = rows_.range(written_, row - written_);
        if (gap.size() > 0) set_zero(policy_, gap);
        written_ = row;
    }

    const P& policy_;
    Tensor tensor_;
    MatrixView<T> rows_;
    Index written_ = 0;
};

}  // namespace colt5
