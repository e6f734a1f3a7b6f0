// SPDX-License-Identifier: MIT
// Attention of each token to those at distance 64 or less, for queries, keys and values x (b, n, 3, h, dim_head).
#include "../measure.hpp"

int main(int argc, char** argv) {
    using colt5::dynamic, colt5::Index, colt5::Tensor, bench::Policy, bench::Scalar;
    const bench::Inputs inputs(argc, argv);
    const Policy& policy = inputs.policy;
    const colt5::LocalAttention attention{.reach = 64};
    const auto qkv = inputs.tensor<Tensor<Scalar, Policy, dynamic, dynamic, dynamic, dynamic, dynamic>>("x");
    const auto d_out = inputs.tensor<Tensor<Scalar, Policy, dynamic, dynamic, dynamic, dynamic>>("d_out");
    const auto [batch, length, three, heads, dim_head] = qkv.shape();

    // Keys and values are apart from queries: the columns of one projection, copied into two.
    const Index inner = heads * dim_head, tokens = batch * length;
    Tensor<Scalar, Policy, dynamic, dynamic, dynamic, dynamic> q(policy, {batch, length, heads, dim_head});
    Tensor<Scalar, Policy, dynamic, dynamic, dynamic, dynamic, dynamic> kv(policy, {batch, length, 2, heads, dim_head});
    const auto columns = [&](Index first, Index count) {
        return colt5::expr::Leaf<Scalar, colt5::expr::Columns::contiguous>(qkv.data() + first, {tokens, count},
                                                                           3 * inner, 1);
    };
    assign(policy, q.view().reshape(std::array{tokens, inner}), columns(0, inner));
    assign(policy, kv.view().reshape(std::array{tokens, 2 * inner}), columns(inner, 2 * inner));

    return bench::serve(policy, [&](bool backward, const bench::Keep& keep) {
        if (!backward) return keep(colt5::local_attention(policy, attention, q, kv, {}));
        const auto saved = colt5::local_attention_forward(policy, attention, q, kv, {});
        keep(colt5::local_attention_vjp(policy, attention, saved, d_out, q, kv, {}));
    });
}
