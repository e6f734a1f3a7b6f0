// SPDX-License-Identifier: MIT
#include "task.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

namespace demo {
namespace {

class Dice {
public:
    explicit Dice(colt5::Random random) : random_(random) {}
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

/// Places for the notes, in ascending order and apart: a note and the gap before it take `stride` of the free bytes.
std::array<std::size_t, notes> scatter_notes(Dice& dice, std::size_t text_length) {
    constexpr std::size_t stride = 2 * note_length;
    std::array<std::size_t, notes> places;
    for (auto& place : places) place = dice.below(text_length - notes * stride);
    std::sort(places.begin(), places.end());
    for (std::size_t i = 0; i < notes; ++i) places[i] += i * stride;
    return places;
}

void add_document(Batch& batch, Dice& dice, std::string_view text) {
    constexpr std::size_t body = length - notes * note_length;
    std::string document(text.substr(dice.below(text.size() - body + 1), body));

    std::string names(keys);
    dice.shuffle(names);
    std::array<std::string, notes> values;
    const auto places = scatter_notes(dice, body);
    for (std::size_t i = 0; i < notes; ++i) {
        for (Index j = 0; j < digits; ++j) values[i] += static_cast<char>('0' + dice.below(10));
        document.replace(places[i], note_length, std::string("<") + names[i] + "=" + values[i] + ">");
        batch.note_places.push_back(static_cast<colt5::TokenIndex>(places[i]));
    }
    std::array<std::size_t, notes> asked;
    std::iota(asked.begin(), asked.end(), std::size_t{0});
    dice.shuffle(asked);
    for (const std::size_t i : asked) {
        for (std::size_t j = 0; j < digits; ++j) {
            batch.answer_places.push_back(static_cast<colt5::TokenIndex>(document.size() + answer_offset + j));
            batch.answer_digits.push_back(static_cast<std::uint8_t>(values[i][j] - '0'));
        }
        document += std::string("<") + names[i] + "?" + std::string(digits, '.') + ">";
    }
    batch.bytes.insert(batch.bytes.end(), document.begin(), document.end());
}

}  // namespace

Batch Task::training_batch(Index step, Index size) const {
    return make(text_.substr(0, text_.size() / 8 * 7), colt5::Random({seed_}, 2 * static_cast<std::uint64_t>(step)),
                size);
}

Batch Task::held_out_batch(Index step, Index size) const {
    return make(text_.substr(text_.size() / 8 * 7), colt5::Random({seed_}, 2 * static_cast<std::uint64_t>(step) + 1),
                size);
}

Batch Task::make(std::string_view text, colt5::Random random, Index size) const {
    Batch batch;
    Dice dice(random);
    for (Index i = 0; i < size; ++i) add_document(batch, dice, text);
    return batch;
}

}  // namespace demo
