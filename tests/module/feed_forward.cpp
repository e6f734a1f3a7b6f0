// SPDX-License-Identifier: MIT
#include <colt5/module/feed_forward.hpp>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

TEST_CASE("FeedForward: RMSNorm, linear, GELU, linear; inference as training; gradients by finite differences") {
    const Cpu policy(2);
    SeedSequence seeds(Seed{1});
    FeedForward<double, Cpu> ff(policy, seeds, 5, 7);
    fill_normal(policy, ff.norm.gamma, seeds.next());
    auto x = normal<double>(policy, std::array<Index, 3>{2, 9, 5}, 0);
    const auto pass = ff.forward(policy, x);
    CHECK(same_bits(ff(policy, x), pass.out));
    auto expected = tensor_like(policy, x);
    for (Index b = 0; b < 2; ++b)
        for (Index i = 0; i < 9; ++i) {
            const Row y = evaluate(ff, row_of(x, b, i));
            std::copy(y.begin(), y.end(), expected.view()[b][i].data());
        }
    CHECK(relative_error(pass.out, expected) <= 1e-12);

    const auto d_out = normal<double>(policy, x.shape(), 1);
    auto gradients = zeros_like_parameters(policy, ff);
    const auto d_x = ff.backward(policy, pass, d_out, x, gradients);
    const auto loss = [&] { return inner(d_out, ff(policy, x)); };
    CHECK(gradient_error(d_x, finite_differences(policy, x, loss)) <= gradient_tolerance);
    check_parameter_gradients(policy, ff, gradients, loss);
}
