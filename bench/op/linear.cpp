// SPDX-License-Identifier: MIT
// y = x · weightᵀ for x (b, n, in): how fast matrices are multiplied.
#include "../measure.hpp"

int main(int argc, char** argv) {
    const bench::Inputs inputs(argc, argv);
    const colt5::Cpu& policy = inputs.policy;
    const auto weight = inputs.tensor<colt5::dynamic, colt5::dynamic>("module.weight");
    const bench::Tokens x = inputs.tokens("x"), d_out = inputs.tokens("d_out");
    return bench::serve(policy, [&](bool backward, const bench::Keep& keep) {
        const auto y = colt5::linear(policy, x, weight);
        if (!backward) return keep(bench::values(y));
        auto d_weight = colt5::tensor_like(policy, weight);
        colt5::assign(policy, d_weight, 0.0f);
        keep(bench::values(colt5::linear_vjp(policy, d_out, x, weight, d_weight.view())));
    });
}
