// SPDX-License-Identifier: MIT
// Indices of the largest logits x (b, 1, n), in descending order of the logits. Numbers: how many.
#include "../measure.hpp"

int main(int argc, char** argv) {
    const bench::Inputs inputs(argc, argv);
    const auto k = static_cast<colt5::Index>(inputs.number(0));
    const bench::Tokens logits = inputs.tokens("x");
    return bench::serve(inputs.policy,
                        [&](bool, const bench::Keep& keep) { keep(colt5::top_k(inputs.policy, logits, {}, k)); });
}
