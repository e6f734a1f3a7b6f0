// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "arms.hpp"
#include "backend.hpp"

namespace experiment {

using colt5::TokenIndex;

enum class Task : std::size_t {
    denoise,   ///< bidirectional: spans of bytes are hidden, the model predicts them
    language,  ///< causal: the next byte
    retrieve   ///< bidirectional: notes hidden in a long text, questions at its end
};
inline constexpr std::array<std::string_view, 3> task_names{"denoise", "language", "retrieve"};

inline constexpr Index hidden_byte = 256, symbols = 257;  // bytes, and a symbol for a hidden byte

/// Sequences, and the targets at some places of each; without places, at all tokens.
struct Batch {
    Index size, length;
    std::vector<TokenIndex> ids;      // (b, n)
    std::vector<TokenIndex> places;   // (b, m)
    std::vector<TokenIndex> targets;  // (b, m), or (b, n)
    Index predictions() const { return static_cast<Index>(targets.size()) / size; }
};

/// Makes batches, as a pure function of (seed, number), so that all arms train on the same ones.
class Data {
public:
    Data(Task task, const Size& size, std::string_view text, std::uint64_t seed)
        : task_(task),
          notes_(static_cast<std::size_t>(std::clamp<Index>(size.length / 256, 4, 16))),
          text_(text),
          seed_(seed) {}

    Batch training_batch(std::uint64_t number, Index size, Index length) const {
        return make(text_.substr(0, text_.size() / 8 * 7), {{seed_}, 2 * number + 1}, size, length);
    }
    /// From the last eighth of the text, which is never trained on. The same for all seeds.
    Batch held_out_batch(std::uint64_t number, Index size, Index length) const {
        return make(text_.substr(text_.size() / 8 * 7), {{0}, 2 * number}, size, length);
    }

private:
    class Dice {
    public:
        Dice(colt5::Seed seed, std::uint64_t stream) : random_(seed, stream) {}
        /// Uniform in [0, n).
        std::size_t below(std::size_t n) {
            return static_cast<std::size_t>(random_.uniform(thrown_++) * static_cast<double>(n));
        }
        template <typename Range>
        void shuffle(Range& range) {
            for (std::size_t i = range.size(); i > 1; --i) std::swap(range[i - 1], range[below(i)]);
        }

    private:
        colt5::Random random_;
        std::uint64_t thrown_ = 0;
    };

    Batch make(std::string_view text, Dice dice, Index size, Index length) const {
        Batch batch{size, length, {}, {}, {}};
        for (Index b = 0; b < size; ++b) {
            if (task_ == Task::retrieve) {
                add_notes(batch, dice, text);
                continue;
            }
            const auto n = static_cast<std::size_t>(length);
            const std::string_view piece = text.substr(dice.below(text.size() - n), n + 1);
            for (std::size_t i = 0; i < n; ++i) batch.ids.push_back(static_cast<unsigned char>(piece[i]));
            if (task_ == Task::language)
                for (std::size_t i = 0; i < n; ++i) batch.targets.push_back(static_cast<unsigned char>(piece[i + 1]));
            else
                hide_spans(batch, dice);
        }
        return batch;
    }

    /// Hides one span of 5 bytes in each 32 bytes.
    static void hide_spans(Batch& batch, Dice& dice) {
        constexpr std::size_t part = 32, span = 5;
        const std::size_t begin = batch.ids.size() - static_cast<std::size_t>(batch.length);
        for (std::size_t i = begin; i + part <= batch.ids.size(); i += part) {
            const std::size_t first = i + dice.below(part - span + 1);
            for (std::size_t j = first; j < first + span; ++j) {
                batch.places.push_back(static_cast<TokenIndex>(j - begin));
                batch.targets.push_back(std::exchange(batch.ids[j], TokenIndex{hidden_byte}));
            }
        }
    }

    /// Notes such as `<K=4821>`, each with its own letter, are at random places of the text. At the end are the
    /// questions `<K?....>` in another order; the model predicts the digits at the dots.
    void add_notes(Batch& batch, Dice& dice, std::string_view text) const {
        constexpr std::size_t digits = 4, note_length = 8, answer_offset = 3;
        std::string names = std::string("ABCDEFGHIJKLMNOPQRSTUVWXYZ").substr(0, 2 * notes_);
        const std::size_t body = static_cast<std::size_t>(batch.length) - 2 * notes_ * note_length;
        std::string document(text.substr(dice.below(text.size() - body), body));
        dice.shuffle(names);
        std::vector<std::size_t> cuts(notes_), asked(notes_);
        for (auto& cut : cuts) cut = dice.below(body + 1);
        std::sort(cuts.begin(), cuts.end());
        std::vector<std::string> values(notes_);
        for (std::size_t i = 0; i < notes_; ++i) {
            for (std::size_t j = 0; j < digits; ++j) values[i] += static_cast<char>('0' + dice.below(10));
            document.insert(cuts[i] + i * note_length, std::string("<") + names[i] + "=" + values[i] + ">");
        }
        std::iota(asked.begin(), asked.end(), std::size_t{0});
        dice.shuffle(asked);
        for (const std::size_t i : asked) {
            for (std::size_t j = 0; j < digits; ++j) {
                batch.places.push_back(static_cast<TokenIndex>(document.size() + answer_offset + j));
                batch.targets.push_back(values[i][j]);
            }
            document += std::string("<") + names[i] + "?" + std::string(digits, '.') + ">";
        }
        for (const char c : document) batch.ids.push_back(static_cast<unsigned char>(c));
    }

    Task task_;
    std::size_t notes_;  // in a document

    std::string_view text_;
    std::uint64_t seed_;
};

/// The length of sequences after the fraction `done` of the training. For retrieval, documents grow from an eighth of
/// the full length in the first 70 %: a router learns only about tokens that it routes, and their number is fixed.
inline Index length_at(Task task, const Size& size, double done) {
    if (task != Task::retrieve) return size.length;
    const double grown = static_cast<double>(size.length) / 8 * std::pow(8, std::min(1.0, done / 0.7));
    const Index unit = size.length / 32;
    return static_cast<Index>(std::lround(grown / static_cast<double>(unit))) * unit;
}

/// Multiplications of `steps` steps of an arm.
inline double total_operations(Task task, const Size& size, Arm arm, Index steps) {
    double sum = 0;
    for (Index i = 0; i < steps; ++i) {
        const Index length = length_at(task, size, static_cast<double>(i) / static_cast<double>(steps));
        sum += static_cast<double>(size.tokens / length * length) *
               operations_per_token(size, arm, length, task == Task::language);
    }
    return sum;
}

/// How many steps of an arm take as many multiplications as `steps` of the learned one. The dense arm makes fewer; the
/// light arm makes more where sequences are short and a larger part is routed; the other arms make `steps`.
inline Index equal_steps(Task task, const Size& size, Arm arm, Index steps) {
    if (arm != Arm::dense && arm != Arm::light) return steps;
    const double budget = total_operations(task, size, Arm::learned, steps);
    auto count = static_cast<Index>(static_cast<double>(steps) * budget / total_operations(task, size, arm, steps));
    while (total_operations(task, size, arm, count + 1) <= budget) ++count;
    while (count > 1 && total_operations(task, size, arm, count) > budget) --count;
    return std::max<Index>(1, count);
}

}  // namespace experiment
