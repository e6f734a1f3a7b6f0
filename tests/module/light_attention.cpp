// SPDX-License-Identifier: MIT
#include <limits>

#include <colt5/module/light_attention.hpp>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr Index dim = 5, heads = 2, dim_head = 3;

constexpr LocalAttention causal(Index reach) {
    return {.reach = reach, .causal = true};
}

TokensTensor<double, Cpu> naive(const Cpu& policy, const LightAttention<double, Cpu>& light,
                                const TokensTensor<double, Cpu>& x, Mask mask) {
    const Index length = x.extent(1), inner_width = heads * dim_head;
    auto out = tensor_like(policy, x);
    for (Index b = 0; b < x.extent(0); ++b) {
        std::vector<Row> qkv;
        for (Index i = 0; i < length; ++i) qkv.push_back(evaluate(light.to_qkv, evaluate(light.norm, row_of(x, b, i))));
        for (Index i = 0; i < length; ++i) {
            Row merged;
            for (Index h = 0; h < heads; ++h) {
                std::vector<Row> keys, values;
                for (Index j = 0; j < length; ++j) {
                    if (std::abs(i - j) > light.schedule.attention.reach || (mask && !mask(b, j))) continue;
                    if (light.schedule.attention.causal && j > i) continue;
                    const Row& of_j = qkv[static_cast<std::size_t>(j)];
                    keys.push_back(part(of_j, inner_width + h * dim_head, dim_head));
                    values.push_back(part(of_j, 2 * inner_width + h * dim_head, dim_head));
                }
                const Row q = part(qkv[static_cast<std::size_t>(i)], h * dim_head, dim_head);
                const Row head = attend(q, keys, values, Row(keys.size(), 1.0));
                merged.insert(merged.end(), head.begin(), head.end());
            }
            const Row y = evaluate(light.to_out, merged);
            std::copy(y.begin(), y.end(), out.view()[b][i].data());
        }
    }
    return out;
}

}  // namespace

TEST_CASE("LightAttention: agrees with a loop over the window, and its gradients with finite differences" *
          not_sanitized) {
    for (const MemoryPlan plan : {MemoryPlan{4096, true}, {4096, false}, {1, true}, {1, false}})
        for (const Index length : {1, 2, 5, 11, 16})
            for (const LocalAttention attention : {LocalAttention{1}, {2}, {20}, causal(1), causal(2), causal(20)}) {
                const Index reach = attention.reach;
                if (plan.tokens_at_a_time == 1 && length <= 3 * reach) continue;  // one part
                CAPTURE(plan.tokens_at_a_time);
                CAPTURE(plan.recompute);
                CAPTURE(length);
                CAPTURE(reach);
                CAPTURE(attention.causal);
                const Cpu policy(1, plan);
                SeedSequence seeds(Seed{1});
                LightAttention<double, Cpu> light(policy, seeds, dim, heads, dim_head, attention);
                fill_normal(policy, light.norm.weight, seeds.next());
                fill_normal(policy, light.norm.bias, seeds.next());
                auto x = normal<double>(policy, std::array<Index, 3>{2, length, dim}, 0);
                const auto some = random_mask(policy, std::array<Index, 2>{2, length}, 1, 0.6);
                for (const Mask mask : {Mask(), some.const_view()}) {
                    auto out = tensor_like(policy, x);
                    const auto saved = light.forward(policy, out.view(), x, mask, !plan.recompute);
                    CHECK(saved.chunks.empty() == plan.recompute);
                    CHECK(same_bits(light(policy, x, mask), out));
                    CHECK(relative_error(out, naive(policy, light, x, mask)) <= 1e-12);
                    const auto d_out = normal<double>(policy, x.shape(), 2);
                    auto gradients = zeros_like_parameters(policy, light);
                    auto d_x = tensor_like(policy, x);
                    light.backward(policy, saved, d_x.view(), d_out, x, mask, gradients);
                    const auto loss = [&] { return inner(d_out, light(policy, x, mask)); };
                    CHECK(gradient_error(d_x, finite_differences(policy, x, loss)) <= gradient_tolerance);
                    check_parameter_gradients(policy, light, gradients, loss);
                }
            }
}

TEST_CASE("LightAttention: results do not depend on the plan") {
    constexpr Index reach = 7, wide = 3 * heads * dim_head;
    const auto results = [](MemoryPlan plan, const LocalAttention& attention, Index length) {
        const Cpu policy(2, plan);
        SeedSequence seeds(Seed{1});
        const LightAttention<double, Cpu> light(policy, seeds, dim, heads, dim_head, attention);
        const auto x = normal<double>(policy, std::array<Index, 3>{3, length, dim}, 0);
        const auto d_out = normal<double>(policy, x.shape(), 2);
        auto mask = random_mask(policy, std::array<Index, 2>{3, length}, 1, 0.6);
        // wider than the reach, over the edges of parts
        std::fill_n(&mask.view()(1, length * 3 / 10), length * 3 / 10, false);
        auto out = tensor_like(policy, x), d_x = tensor_like(policy, x);
        const auto saved = light.forward(policy, out.view(), x, mask.const_view(), !plan.recompute);
        // What a chunk leaves to the next one must not overlap the place that it is moved to: three halos.
        Index first = 0;
        for (const auto& chunk : saved.chunks) {
            first += chunk.q.extent(1);
            if (first < length) CHECK(chunk.q.extent(1) >= 3 * light.schedule.attention.halo());
            if (first == length) first = 0;
        }
        auto gradients = zeros_like_parameters(policy, light);
        light.backward(policy, saved, d_x.view(), d_out, x, mask.const_view(), gradients);
        TokensTensor<double, Cpu> d_weight(policy, {1, dim, wide});
        std::copy_n(gradients.to_qkv.weight.data(), d_weight.size(), d_weight.data());
        return std::array{std::move(out), std::move(d_x), std::move(d_weight)};
    };
    for (const LocalAttention attention : {LocalAttention{reach}, {reach, MaskedRows::window_mean}, causal(reach)})
        for (const Index length : {1, 20, 22, 43, 83, 85, 127, 200}) {
            const auto whole = results({600, true}, attention, length);
            for (const Index tokens : {Index{400}, Index{200}, Index{100}, Index{64}, Index{42}, Index{41}, Index{20},
                                       Index{2}, Index{1}, std::numeric_limits<Index>::max()})
                for (const bool recompute : {true, false}) {
                    CAPTURE(length);
                    CAPTURE(tokens);
                    CAPTURE(recompute);
                    const auto parts = results({tokens, recompute}, attention, length);
                    for (std::size_t i = 0; i < whole.size(); ++i) CHECK(relative_error(parts[i], whole[i]) <= 1e-13);
                }
        }
}

TEST_CASE("LightAttention: causal outputs do not depend on what comes after them") {
    const Cpu policy(2, {64, true});
    SeedSequence seeds(Seed{1});
    LightAttention<float, Cpu, true> light(policy, seeds, dim, heads, 4, causal(9), {8, 12}, true);
    auto x = normal<float>(policy, std::array<Index, 3>{2, 300, dim}, 0);
    const auto out = light(policy, x, {});
    const auto noise = normal<float>(policy, x.shape(), 1);
    for (Index b = 0; b < 2; ++b) std::copy_n(noise.view()[b][211].data(), 89 * dim, x.view()[b][211].data());
    const auto changed = light(policy, x, {});
    for (Index b = 0; b < 2; ++b) {
        for (Index i = 0; i < 211; ++i) CHECK(same_bits(changed.view()[b][i], out.view()[b][i]));
        CHECK(!same_bits(changed.view()[b][211], out.view()[b][211]));
    }
}
