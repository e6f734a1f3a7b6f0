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

/// Places for the notes in a piece of text, in ascending order and apart, before a word where one begins nearby.
std::array<std::size_t, notes> scatter_notes(Dice& dice, std::string_view text) {
    constexpr std::size_t apart = 12, nearby = 10;
    std::array<std::size_t, notes> places;
    for (auto& place : places) place = dice.below(text.size() - notes * apart);
    std::sort(places.begin(), places.end());
    for (std::size_t i = 0; i < notes; ++i) {
        places[i] += i * apart;
        const std::size_t space = text.find(' ', places[i]);
        if (space < places[i] + nearby) places[i] = space + 1;
    }
    return places;
}

void add_document(Batch& batch, Dice& dice, std::string_view text) {
    const auto body = static_cast<std::size_t>(batch.length - 2 * notes * note_length);
    std::string document(text.substr(dice.below(text.size() - body + 1), body));

    std::string names(keys);
    dice.shuffle(names);
    std::array<std::string, notes> values;
    const auto places = scatter_notes(dice, document);
    for (std::size_t i = 0; i < notes; ++i) {
        for (Index j = 0; j < digits; ++j) values[i] += static_cast<char>('0' + dice.below(10));
        const std::size_t place = places[i] + i * note_length;  // the notes before it moved it
        document.insert(place, std::string("<") + names[i] + "=" + values[i] + ">");
        batch.note_places.push_back(static_cast<colt5::TokenIndex>(place));
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

Batch Task::training_batch(Index step, Index size, Index length) const {
    return make(text_.substr(0, text_.size() / 8 * 7), colt5::Random({seed_}, 2 * static_cast<std::uint64_t>(step) + 1),
                size, length);
}

Batch Task::held_out_batch(Index step, Index size, Index length) const {
    return make(text_.substr(text_.size() / 8 * 7), colt5::Random({seed_}, 2 * static_cast<std::uint64_t>(step)), size,
                length);
}

Batch Task::make(std::string_view text, colt5::Random random, Index size, Index length) const {
    Batch batch;
    batch.length = length;
    Dice dice(random);
    for (Index i = 0; i < size; ++i) add_document(batch, dice, text);
    return batch;
}

}  // namespace demo
