// SPDX-License-Identifier: MIT
// The paper's base block. Number: the length, for which it routes as many tokens as the paper.
#include <colt5/module/paper.hpp>

#include "../measure.hpp"

int main(int argc, char** argv) {
    const bench::Inputs inputs(argc, argv);
    using Block = colt5::ConditionalRoutedTransformerBlock<colt5::config::colt5_base, bench::Scalar, bench::Policy>;
    const auto length = static_cast<colt5::Index>(inputs.number(0));
    return serve_module(inputs, Block(inputs.policy), colt5::config::colt5_tokens(length));
}
