// SPDX-License-Identifier: MIT
// y = x · weightᵀ for x (b, n, in): how fast matrices are multiplied.
#include "../measure.hpp"

int main(int argc, char** argv) {
    const bench::Inputs inputs(argc, argv);
    const bench::Policy& policy = inputs.policy;
    const auto weight = inputs.tensor<colt5::MatrixTensor<bench::Scalar, bench::Policy>>("module.weight");
    const bench::Tokens x = inputs.tokens("x"), d_out = inputs.tokens("d_out");
    return bench::serve(policy, [&](bool backward, const bench::Keep& keep) {
        const auto y = colt5::linear(policy, x, weight);
        if (!backward) return keep(y);
        colt5::MatrixTensor<colt5::accumulate_t<bench::Scalar>, bench::Policy> d_weight(policy, weight.shape());
        colt5::set_zero(policy, d_weight);
        keep(colt5::linear_vjp(policy, d_out, x, weight, d_weight.view()));
    });
}
