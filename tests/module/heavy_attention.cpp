// SPDX-License-Identifier: MIT
#include <colt5/module/heavy_attention.hpp>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr Index dim = 5, heads = 4, dim_head = 3;

TokensTensor<double, Cpu> naive(const Cpu& policy, const HeavyAttention<double, Cpu>& heavy,
                                const TokensTensor<double, Cpu>& x, const HostTensor<double, 4>& context, KeyMask mask,
                                TokensView<const double> scores) {
    const Index routes = context.extent(1), tokens = context.extent(2), per_route = heads / routes;
    auto out = tensor_like(policy, x);
    for (Index b = 0; b < x.extent(0); ++b)
        for (Index i = 0; i < x.extent(1); ++i) {
            const Row q = evaluate(heavy.to_q, evaluate(heavy.norm, row_of(x, b, i)));
            Row merged;
            for (Index h = 0; h < heads; ++h) {
                const Index r = h / per_route, in_route = h % per_route;
                std::vector<Row> keys, values;
                Row scales;
                for (Index j = 0; j < tokens; ++j) {
                    if (mask && !mask(b, r, j)) continue;
                    const double* const token = context.const_view()[b][r][j].data();
                    // All routes' rows of to_kv: (route, head in route, [key, value])
                    const Row kv = evaluate(heavy.to_kv, evaluate(heavy.norm, Row(token, token + dim)));
                    const Index first = (r * per_route + in_route) * 2 * dim_head;
                    keys.push_back(part(kv, first, dim_head));
                    values.push_back(part(kv, first + dim_head, dim_head));
                    scales.push_back(scores ? scores(b, r, j) : 1);
                }
                const Row head = attend(part(q, h * dim_head, dim_head), keys, values, scales);
                merged.insert(merged.end(), head.begin(), head.end());
            }
            const Row y = evaluate(heavy.to_out, merged);
            std::copy(y.begin(), y.end(), out.view()[b][i].data());
        }
    return out;
}

}  // namespace

TEST_CASE("HeavyAttention: agrees with a loop over all pairs, and its gradients with finite differences") {
    const Cpu policy(1);
    for (const Index routes : {1, 2, 4}) {
        CAPTURE(routes);
        SeedSequence seeds(Seed{1});
        HeavyAttention<double, Cpu> heavy(policy, seeds, dim, heads, dim_head);
        fill_normal(policy, heavy.norm.gamma, seeds.next());
        auto x = normal<double>(policy, std::array<Index, 3>{2, 4, dim}, 0);
        auto context = normal<double>(policy, std::array<Index, 4>{2, routes, 6, dim}, 1);
        auto scores = normal<double>(policy, std::array<Index, 3>{2, routes, 6}, 2);
        auto some = random_mask(policy, std::array<Index, 3>{2, routes, 6}, 3);
        for (Index j = 0; j < 6; ++j) some.view()(1, 0, j) = false;  // heads of this route see nothing
        for (const KeyMask mask : {KeyMask(), some.const_view()})
            for (const auto given : {TokensView<const double>(), scores.const_view()}) {
                const auto saved = heavy.forward(policy, x, context, mask, given);
                CHECK(relative_error(saved.out, naive(policy, heavy, x, context, mask, given)) <= 1e-12);
                const auto d_out = normal<double>(policy, x.shape(), 4);
                auto gradients = zeros_like_parameters(policy, heavy);
                const auto d = heavy.backward(policy, saved, d_out, x, context, mask, given, gradients);
                const auto loss = [&] { return inner(d_out, heavy.forward(policy, x, context, mask, given).out); };
                CHECK(gradient_error(d.d_x, finite_differences(policy, x, loss)) <= gradient_tolerance);
                CHECK(gradient_error(d.d_context, finite_differences(policy, context, loss)) <= gradient_tolerance);
                CHECK(static_cast<bool>(d.d_scores) == static_cast<bool>(given));
                if (given)
                    CHECK(gradient_error(d.d_scores, finite_differences(policy, scores, loss)) <= gradient_tolerance);
                check_parameter_gradients(policy, heavy, gradients, loss);
            }
    }
}
