// SPDX-License-Identifier: MIT
// Makes as many tensors as x (1, 1, n) has numbers, of 1 to 7 rows of 64, which all live at once, and frees them: what
// a data set of sequences asks of the workspace. Nothing is written into them; the result is x.
#include <array>
#include <cstddef>
#include <vector>

#include "../measure.hpp"

int main(int argc, char** argv) {
    const bench::Inputs inputs(argc, argv);
    const bench::Policy& policy = inputs.policy;
    const bench::Tokens x = inputs.tokens("x");
    return bench::serve(policy, [&](bool, const bench::Keep& keep) {
        std::vector<colt5::MatrixTensor<bench::Scalar, bench::Policy>> tensors;
        tensors.reserve(static_cast<std::size_t>(x.size()));
        for (colt5::Index i = 0; i < x.size(); ++i)
            tensors.emplace_back(policy, std::array<colt5::Index, 2>{1 + i % 7, 64});
        keep(x);
    });
}
