// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <string_view>

#include <colt5/core/view.hpp>

/// "Does routing help?": one model with different ways to choose the tokens of the heavy branch, at equal numbers of
/// multiplications. docs/experiment.md explains it and shows the results.
namespace experiment {

using colt5::Index;

/// Who chooses the tokens of the heavy branch, and what their output is multiplied by.
enum class Arm : std::size_t {
    learned,       ///< trained logits, linear in the tokens; scores of converged coordinate descent
    fixed_stride,  ///< every 16th token, the paper's "static"; score 1
    random,        ///< different ones in each call; score 1
    frozen,        ///< as learned, but neither the router nor the tokens get a gradient from the scores
    position,      ///< as learned, but the router sees sines and cosines of the position instead of the token
    package,       ///< the PyTorch package's default: 50 steps of descent, no scaling of the logits, straight-through
    light,         ///< no heavy branch; the light feedforward is wider
    dense          ///< all tokens take the heavy branch; fewer steps
};
inline constexpr std::array<std::string_view, 8> arm_names{"learned",  "static",  "random", "frozen",
                                                           "position", "default", "light",  "dense"};

/// Whether an arm's scores are those of the descent, between 0 and 1; otherwise they are 1.
constexpr bool has_soft_scores(Arm arm) {
    return arm == Arm::learned || arm == Arm::frozen || arm == Arm::position;
}
/// Whether its router computes a gradient. (That of `package` can be exactly 0, see docs/experiment.md.)
constexpr bool trains_router(Arm arm) {
    return arm == Arm::learned || arm == Arm::position || arm == Arm::package;
}

/// A size of the model.
struct Size {
    Index dim, light_heads, light_dim_head, light_window, heavy_heads, heavy_dim_head;
    Index depth;
    Index length;          ///< tokens of a sequence
    Index tokens;          ///< of a training step, before rounding down to whole sequences
    double learning_rate;  ///< the largest
    double light_ff_mult = 0.5, heavy_ff_mult = 4;
    Index share = 16;  ///< one token in `share` takes the heavy branch
};

/// Multiplications of one block in a forward pass over `length` tokens, of which `routed` are chosen each time: as
/// queries, as keys and values, and for the heavy feedforward. A causal window is half as large, and a causal query
/// sees half of the routed keys on average.
inline double operations(const Size& size, Index length, Index routed, Index light_hidden, bool has_router,
                         bool causal) {
    const auto n = static_cast<double>(length), k = static_cast<double>(routed), d = static_cast<double>(size.dim);
    const auto light = static_cast<double>(size.light_heads * size.light_dim_head);
    const auto heavy = static_cast<double>(size.heavy_heads * size.heavy_dim_head);
    const double half = causal ? 0.5 : 1;
    const double light_attention =
        n * (4 * d * light + 2 * (half * static_cast<double>(size.light_window) + 1) * light);
    const double light_ff = n * 2 * d * static_cast<double>(light_hidden);
    const double heavy_attention = k * 4 * d * heavy + half * 2 * k * k * heavy;
    const double heavy_ff = k * 2 * d * d * size.heavy_ff_mult;
    return light_attention + light_ff + heavy_attention + heavy_ff + (has_router ? 3 * n * d : 0);
}

/// The hidden width of an arm's light feedforward. In the arm `light`, a block has as many operations as a learned one,
/// with the added width rounded up to a multiple of dim / 32.
inline Index light_hidden(const Size& size, Arm arm, bool causal) {
    const auto usual = static_cast<Index>(static_cast<double>(size.dim) * size.light_ff_mult);
    if (arm != Arm::light) return usual;
    const double more = operations(size, size.length, size.length / size.share, usual, true, causal) -
                        operations(size, size.length, 0, usual, false, causal);
    const double width = more / (2 * static_cast<double>(size.dim * size.length));
    const auto unit = static_cast<double>(size.dim / 32);
    return usual + static_cast<Index>(std::ceil(width / unit) * unit);
}

/// Tokens that an arm's heavy branch takes of a sequence of `length`: as many for a shorter sequence as for a full one,
/// except in the arm `dense`.
inline Index routed_tokens(const Size& size, Arm arm, Index length) {
    if (arm == Arm::light) return 0;
    return arm == Arm::dense ? length : size.length / size.share;
}

/// Multiplications of all blocks, for each token.
inline double operations_per_token(const Size& size, Arm arm, Index length, bool causal) {
    const bool has_router = has_soft_scores(arm) || trains_router(arm);
    return static_cast<double>(size.depth) / static_cast<double>(length) *
           operations(size, length, routed_tokens(size, arm, length), light_hidden(size, arm, causal), has_router,
                      causal);
}

}  // namespace experiment
