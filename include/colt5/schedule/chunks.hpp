// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>

#include <colt5/core/tensor.hpp>
#include <colt5/op/gradient_epilogue.hpp>

namespace colt5 {

/// The tokens [first, first + tokens) of the sequences [sequence, sequence + sequences) of a batch: whole sequences, or
/// a part of one.
struct Chunk {
    Index sequence, sequences, first, tokens;
    bool is_last;  ///< whether it ends where its sequences end

    /// The part of a tensor that belongs to this chunk. The tensor (b, n, …) has all sequences and tokens of the batch.
    template <Viewable T>
    auto of(const T& tensor) const {
        return slice(tensor.view());
    }
    template <Viewable T>
    auto of(T& tensor) const {
        return slice(tensor.view());
    }
    /// All tokens of its sequences.
    template <Viewable T>
    auto sequences_of(const T& tensor) const {
        return tensor.view().range(sequence, sequences);
    }

    template <typename T, Policy P, std::size_t updates>
    auto of(GradientEpilogue<T, P, updates> epilogue) const {
        epilogue.d_residual = of(epilogue.d_residual);
        for (auto& update : epilogue.rank_one) {
            update.s = sequences_of(update.s);
            update.first = first;
        }
        return epilogue;
    }

private:
    template <typename V>
    auto slice(const V& view) const {
        const auto whole = view.range(sequence, sequences);
        if (!whole) return whole;
        auto shape = whole.shape();
        const Index rows = shape[0] * shape[1], stride = rows > 0 ? whole.size() / rows : 0;
        shape[1] = tokens;
        return V::unchecked(whole.data() + first * stride, shape);
    }
};

/// A batch in chunks of about the policy's tokens_at_a_time, in order. One chunk goes through all layers of a light
/// branch before the next, so that what lies between two layers is small and stays in caches. No chunk is shorter than
/// `least`, unless it is the last of its sequence, and all begin at multiples of `multiple`. Where sequences are cut
/// depends on their length alone.
class Chunks {
public:
    Chunks(const MemoryPlan& plan, Index batch, Index length, Index least = 1, Index multiple = 1)
        : batch_(batch), length_(length) {
        const Index most = std::max(plan.tokens_at_a_time, Index{1});
        per_sequence_ =
            std::clamp(divide_up(length, most), Index{1}, std::max(Index{1}, length / std::max(least, Index{1})));
        tokens_ = round_up(std::max(Index{1}, divide_up(length, per_sequence_)), multiple);
        per_sequence_ = std::max(Index{1}, divide_up(length, tokens_));
        sequences_ = per_sequence_ > 1 ? 1 : std::clamp(most / tokens_, Index{1}, std::max(Index{1}, batch));
    }

    Index count() const { return divide_up(batch_, sequences_) * per_sequence_; }
    Chunk operator[](Index i) const {
        const Index sequence = i / per_sequence_ * sequences_, first = i % per_sequence_ * tokens_;
        return {sequence, std::min(sequences_, batch_ - sequence), first, std::min(tokens_, length_ - first),
                first + tokens_ >= length_};
    }
    /// The largest extents of a chunk.
    Index sequences() const { return std::min(sequences_, batch_); }
    Index tokens() const { return std::min(tokens_, length_); }

private:
    Index batch_, length_, per_sequence_, tokens_, sequences_;
};

/// body(chunk) for the chunks of tokens x (b, n, …), in order.
template <Policy P, Viewable X, typename Body>
void in_chunks(const P& policy, const X& x, Body&& body) {
    const Chunks chunks(policy.memory_plan(), x.extent(0), x.extent(1));
    for (Index i = 0; i < chunks.count(); ++i) body(chunks[i]);
}

}  // namespace colt5
