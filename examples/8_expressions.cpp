// SPDX-License-Identifier: MIT
// The expression library by itself: each assign is one fused, vectorized pass over the rows.
#include <colt5/colt5.hpp>

#include <cstdio>

int main() {
    using namespace colt5;
    Cpu policy;
    MatrixTensor<float, Cpu> x(policy, {1000, 64}), y(policy, {1000, 64});
    VectorTensor<float, Cpu> gamma(policy, {64}), scores(policy, {1000});
    VectorTensor<bool, Cpu> mask(policy, {1000});
    fill_normal(policy, x, Random(Seed{0}));
    fill(policy, gamma, 1);
    fill_with(policy, scores, [](std::size_t i) { return 1.0 / static_cast<double>(i + 1); });
    fill_with(policy, mask, [](std::size_t i) { return i < 900; });

    // [expressions]
    assign(policy, y, exp(x - row_log_sum_exp(x)));                     // softmax
    assign(policy, y, x / max(row_norm(x), 1e-12f) * 8 * row(gamma));   // RMSNorm of 64 columns: √64 = 8
    assign(policy, y, select(column(mask), x * column(scores), 0.0f));  // rows weighted, masked ones zeroed
    // [expressions]

    std::printf("norm of the last real row %g, of the first masked one %g\n", y.matrix().row(899).norm(),
                y.matrix().row(900).norm());
    return y.matrix().row(900).norm() == 0 ? 0 : 1;
}
