// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <string>
#include <vector>

#include "task.hpp"

namespace demo {

inline constexpr Index layers = 2;
inline constexpr Index light_window = 16;  // bytes, half of them to either side
inline constexpr Index heavy_tokens = full_length / 16;

/// What a layer routes: queries, keys and values, tokens of the feedforward.
enum Kind : std::size_t { queries, keys_values, feedforward };
inline constexpr std::array<const char*, 3> kind_names{"queries", "keys and values", "feedforward"};

struct Routed {
    std::vector<float> scores;              // (full_length): of one document; 0 where a byte is not routed
    double in_notes = 0, in_questions = 0;  // of the tokens that all held-out documents route, the part that lies there
};

struct Point {
    double step, loss, accuracy;
};

/// All that the report says about a model.
struct Result {
    std::string name;
    std::vector<Point> curve;                          // of training
    double loss = 0, accuracy = 0;                     // on held-out documents
    double tokens_per_second = 0;                      // trained on, in a second of one core
    double heavy_share = 0;                            // of the tokens that take a heavy branch
    Batch document;                                    // a held-out one,
    std::array<std::array<Routed, 3>, layers> routed;  // what is routed in it,
    std::string predicted;                             // and the digits that the model gives as answers
};

}  // namespace demo
