// SPDX-License-Identifier: MIT
// Attention of each token to those at distance 64 or less, for queries, keys and values x (b, n, 3, h, dim_head).
#include "../measure.hpp"

int main(int argc, char** argv) {
    using colt5::dynamic, colt5::Tensor, bench::Policy, bench::Scalar;
    const bench::Inputs inputs(argc, argv);
    const Policy& policy = inputs.policy;
    const colt5::LocalAttention attention{.reach = 64};
    const auto qkv = inputs.tensor<Tensor<Scalar, Policy, dynamic, dynamic, dynamic, dynamic, dynamic>>("x");
    const auto d_out = inputs.tensor<Tensor<Scalar, Policy, dynamic, dynamic, dynamic, dynamic>>("d_out");
    return bench::serve(policy, [&](bool backward, const bench::Keep& keep) {
        if (!backward) return keep(colt5::local_attention(policy, attention, qkv, {}));
        const auto pass = colt5::local_attention_forward(policy, attention, qkv, {});
        keep(colt5::local_attention_vjp(policy, attention, pass, d_out, qkv, {}));
    });
}
