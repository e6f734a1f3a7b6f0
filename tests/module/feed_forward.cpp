// SPDX-License-Identifier: MIT
#include <colt5/module/feed_forward.hpp>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

TEST_CASE("FeedForward: RMSNorm, linear, GELU, linear; inference as training; gradients by finite differences") {
    for (const MemoryPlan plan :
         {MemoryPlan{4096, true}, {4096, false}, {20, true}, {5, true}, {5, false}, {1, true}}) {
        CAPTURE(plan.tokens_at_a_time);
        const Cpu policy(2, plan);
        SeedSequence seeds(Seed{1});
        FeedForward<double, Cpu> ff(policy, seeds, 5, 7);
        fill_normal(policy, ff.norm.gamma, seeds.next());
        auto x = normal<double>(policy, std::array<Index, 3>{3, 9, 5}, 0);
        auto out = tensor_like(policy, x);
        const auto saved = ff.forward(policy, out.view(), x, !plan.recompute);
        CHECK(static_cast<bool>(saved.pre_activation) == !plan.recompute);
        CHECK(same_bits(ff(policy, x), out));
        auto expected = tensor_like(policy, x);
        for (Index b = 0; b < 3; ++b)
            for (Index i = 0; i < 9; ++i) {
                const Row y = evaluate(ff, row_of(x, b, i));
                std::copy(y.begin(), y.end(), expected.view()[b][i].data());
            }
        CHECK(relative_error(out, expected) <= 1e-12);

        const auto d_out = normal<double>(policy, x.shape(), 1);
        auto gradients = zeros_like_parameters(policy, ff);
        auto d_x = tensor_like(policy, x);
        ff.backward(policy, saved, d_x.view(), d_out, x, gradients);
        const auto loss = [&] { return inner(d_out, ff(policy, x)); };
        CHECK(gradient_error(d_x, finite_differences(policy, x, loss)) <= gradient_tolerance);
        check_parameter_gradients(policy, ff, gradients, loss);
    }
}
