// SPDX-License-Identifier: MIT
// The routed feedforward of the flagship block.
#include "../measure.hpp"

namespace {

constexpr colt5::FeedForwardConfig config{
    .dim = 512, .num_heavy_tokens = 1024, .light_ff_mult = 0.5, .heavy_ff_mult = 4};

}  // namespace

int main(int argc, char** argv) {
    const bench::Inputs inputs(argc, argv);
    return serve_module(inputs,
                        colt5::ConditionalRoutedFeedForward<config, bench::Scalar, bench::Policy>(inputs.policy));
}
