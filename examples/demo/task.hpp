// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <colt5/core/random.hpp>
#include <colt5/op/gather.hpp>

/// Needle retrieval. Into a piece of real text go notes such as `<K=4821>`, one for each key, at random places; at the
/// end stand the questions `<K?....>`, in another order. The model predicts the digits at the dots.
///
/// Window attention cannot see from a question to its note. The heavy branch can, if the routers choose both.
namespace demo {

using colt5::Index;

inline constexpr Index full_length = 1024;  // bytes of a document
inline constexpr Index notes = 4;           // and as many questions
inline constexpr Index digits = 4;          // of an answer
inline constexpr Index note_length = 8;     // `<K=4821>`
inline constexpr Index answer_offset = 3;   // of the first digit in it
inline constexpr std::string_view keys = "ABCDEFGH";
inline constexpr Index answers = notes * digits;      // predictions for a document
inline constexpr std::size_t least_text = 16 * 1024;  // bytes that a text must have

struct Batch {
    Index length = 0;                              // of each document
    std::vector<std::uint8_t> bytes;               // (b, length)
    std::vector<colt5::TokenIndex> answer_places;  // (b, answers)
    std::vector<std::uint8_t> answer_digits;       // (b, answers): 0 … 9
    std::vector<colt5::TokenIndex> note_places;    // (b, notes): where each begins
    Index size() const { return static_cast<Index>(bytes.size()) / length; }
};

/// Documents from a text: a pure function of (seed, step), so that every model learns from the same ones.
class Task {
public:
    Task(std::string_view text, std::uint64_t seed) : text_(text), seed_(seed) {}
    Batch training_batch(Index step, Index size, Index length) const;
    /// From the last eighth of the text, which is never trained on.
    Batch held_out_batch(Index step, Index size, Index length = full_length) const;

private:
    Batch make(std::string_view text, colt5::Random random, Index size, Index length) const;

    std::string_view text_;
    std::uint64_t seed_;
};

}  // namespace demo
