// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <utility>

#include <colt5/cpu/gemm.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/policy.hpp>

namespace colt5::cpu {

/// Rows in groups that stay in a cache while one operation after the other works on them.
///
/// How they are cut depends on the length of a sequence alone, so that a BLAS gives a sequence the same bits in any
/// batch and with any number of threads. Our own products do so however rows are cut, and take a batch whose sequences
/// lie one after the other as one sequence.
class Panels {
public:
    Panels(Index batch, Index length, Index largest, bool contiguous = true) : batch_(batch), length_(length) {
        if (contiguous && !uses_blas) length_ *= std::exchange(batch_, 1);
        per_sequence_ = divide_up(length_, largest);
    }

    Index count() const { return batch_ * per_sequence_; }
    /// Calls body(sequence, first row, rows) for one of them.
    template <typename Body>
    void visit(Index i, Body&& body) const {
        const Index first = begin(i % per_sequence_);
        body(i / per_sequence_, first, begin(i % per_sequence_ + 1) - first);
    }
    /// The same for all, in parallel.
    template <typename Body>
    void for_each(const Cpu& policy, Body&& body) const {
        parallel_for(policy, count(), [&](Index i) { visit(i, body); });
    }

private:
    /// Whole tiles of rows, shared out evenly: threads would wait for the one whose panels are larger.
    Index begin(Index panel) const {
        constexpr Index unit = GemmTile<float>::rows;
        return std::min(length_, divide_up(length_, unit) * panel / per_sequence_ * unit);
    }

    Index batch_, length_, per_sequence_;
};

/// Panels in which tokens go through an operation: few enough rows to share out short sequences, and otherwise as many
/// as one strip of packed weights serves before the next one comes.
inline Panels panels(Index batch, Index length, bool contiguous = true) {
    const Index rows = contiguous && !uses_blas ? batch * length : length;
    const Index count = divide_up(rows, std::clamp(divide_up(rows, 16), few_rows, GemmTile<float>::panel_rows));
    const Index even = count > 1 ? count + count % 2 : 1;  // after an odd last one, the second thread would wait
    return {batch, length, std::max(Index{1}, divide_up(rows, even)), contiguous};
}

/// What a backward pass works on at a time: first panel by panel the gradients of the rows, then those of the weights,
/// from what the panels have left in the third cache.
inline Panels chunks(Index batch, Index length, bool contiguous = true) {
    return {batch, length, Index{1024}, contiguous};
}

}  // namespace colt5::cpu
