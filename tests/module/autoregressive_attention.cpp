// SPDX-License-Identifier: MIT
#include <colt5/module/conditional_routed_autoregressive_attention.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <set>
#include <vector>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr Index dim = 6;

constexpr AutoregressiveAttentionConfig with(Index routes, Index heavy_window, bool options) {
    return {.dim = dim,
            .num_heavy_tokens_q = 3,
            .num_heavy_tokens_kv = 5,
            .num_routed_kv = routes,
            .light_dim_head = 2,
            .light_heads = 2,
            .light_window_size = 4,
            .heavy_window_size = heavy_window,
            .heavy_dim_head = 4,
            .heavy_heads = 2,
            .router_straight_through = false,
            .router_kwargs = {.coor_descent = {.score_scale = 0.4}},
            .use_null_q_tokens = options,
            .rotary_emb = options};
}
constexpr AutoregressiveAttentionConfig plain = with(1, 0, false), full = with(2, 6, true), wide = with(1, 8, true),
                                        straight = [] {
                                            AutoregressiveAttentionConfig config = with(2, 0, true);
                                            config.router_straight_through = true;
                                            return config;
                                        }();
template <AutoregressiveAttentionConfig config, typename Scalar = double>
using Attention = ConditionalRoutedAutoregressiveAttention<config, Scalar, Cpu>;

Row rotated(const Row& x, Index position, const VectorTensor<float, Cpu>& inv_freq) {
    const std::size_t pairs = x.size() / 2;
    Row y(x);
    for (std::size_t i = 0; i < pairs; ++i) {
        const double angle = static_cast<double>(position) * static_cast<double>(inv_freq.data()[i]);
        y[i] = x[i] * std::cos(angle) - x[i + pairs] * std::sin(angle);
        y[i + pairs] = x[i + pairs] * std::cos(angle) + x[i] * std::sin(angle);
    }
    return y;
}

}  // namespace

TEST_CASE_TEMPLATE("autoregressive attention: agrees with loops over tokens", Module, Attention<plain>, Attention<full>,
                   Attention<wide>) {
    const Cpu policy(2);
    const Module module(policy, Seed{1});
    constexpr bool options = !std::is_same_v<Module, Attention<plain>>;
    constexpr Index routes = Module::KVRouter::num_routing_tokens;
    constexpr Index window = std::is_same_v<Module, Attention<plain>>  ? 4
                             : std::is_same_v<Module, Attention<full>> ? 6
                                                                       : 8;
    for (const Index length : {3, 4, 24, 37}) {
        CAPTURE(length);
        const auto x = normal<double>(policy, std::array<Index, 3>{2, length, dim}, 0);
        auto expected = filled<double>(policy, x.shape(), 0);
        const auto& light = module.light_attn;
        const auto& heavy = module.heavy_attn;
        for (Index b = 0; b < 2; ++b) {
            // The light branch: the window before, and the own one up to the token.
            for (Index i = 0; i < length; ++i) {
                Row attended;
                for (Index h = 0; h < 2; ++h) {
                    std::vector<Row> keys, values;
                    for (Index j = std::max(Index{0}, (i / 4 - 1) * 4); j <= i; ++j) {
                        const Row qkv = evaluate(light.to_qkv, evaluate(light.norm, row_of(x, b, j)));
                        keys.push_back(part(qkv, 4 + 2 * h, 2));
                        values.push_back(part(qkv, 8 + 2 * h, 2));
                    }
                    const Row query = part(evaluate(light.to_qkv, evaluate(light.norm, row_of(x, b, i))), 2 * h, 2);
                    const Row of_head = attend(query, keys, values, Row(keys.size(), 1.0));
                    attended.insert(attended.end(), of_head.begin(), of_head.end());
                }
                const Row out = evaluate(light.to_out, attended);
                for (Index d = 0; d < dim; ++d) expected.view()(b, i, d) = out[static_cast<std::size_t>(d)];
            }
            // The heavy branch: each window is routed as a sequence of its own, its keys as the tokens before it. The
            // k of the descent is limited by the padded lengths.
            const Index step = std::lcm(window, Index{4}), padded = (length + step - 1) / step * step;
            for (Index first = window; first < length; first += window) {
                const Index count = std::min(window, length - first);
                const auto pick = [&](const auto& router, Index begin, Index real, Index all, Index k) {
                    HostTensor<double, 3> tokens = filled<double>(policy, std::array<Index, 3>{1, all, dim}, 0);
                    for (Index i = 0; i < real; ++i)
                        std::copy_n(&x.const_view()(b, begin + i, 0), dim, &tokens.view()(0, i, 0));
                    const auto mask = mask_of_lengths(policy, {real}, all);
                    return router.route(policy, tokens.const_view(), mask.const_view(), k);
                };
                const auto q = pick(module.q_router.inner, first, count, window, 3);
                const auto kv = pick(module.kv_router, 0, first, padded, 5);
                std::set<Index> chosen;
                for (Index i = 0; i < q.indices.extent(2); ++i) {
                    const Index at = q.indices.const_view()(0, 0, i), token = first + at;
                    if (at >= count) continue;
                    chosen.insert(token);
                    Row query = evaluate(heavy.to_q, evaluate(heavy.norm, row_of(x, b, token))), attended;
                    for (Index h = 0; h < 2; ++h) {
                        const Index route = h * routes / 2;
                        const double* const null_kv = heavy.null_kv.data();
                        std::vector<Row> keys{Row(null_kv + 4 * h, null_kv + 4 * h + 4)},
                            values{Row(null_kv + 8 + 4 * h, null_kv + 8 + 4 * h + 4)};
                        Row scores{1};
                        for (Index j = 0; j < kv.indices.extent(2); ++j) {
                            const Index key = kv.indices.const_view()(0, route, j);
                            if (key >= first) continue;
                            const Row projected = evaluate(heavy.to_kv, evaluate(heavy.norm, row_of(x, b, key)));
                            keys.push_back(part(projected, 8 * h, 4));
                            if (options) keys.back() = rotated(keys.back(), key, heavy.inv_freq);
                            values.push_back(part(projected, 8 * h + 4, 4));
                            scores.push_back(kv.scores.const_view()(0, route, j));
                        }
                        Row of_query = part(query, 4 * h, 4);
                        if (options) of_query = rotated(of_query, token, heavy.inv_freq);
                        const Row of_head = attend(of_query, keys, values, scores);
                        attended.insert(attended.end(), of_head.begin(), of_head.end());
                    }
                    const Row out = evaluate(heavy.to_out, attended);
                    for (Index d = 0; d < dim; ++d)
                        expected.view()(b, token, d) +=
                            q.scores.const_view()(0, 0, i) * out[static_cast<std::size_t>(d)];
                }
                for (Index i = first; i < first + count && options; ++i)
                    for (Index d = 0; d < dim && chosen.count(i) == 0; ++d)
                        expected.view()(b, i, d) += module.null_q_token.const_view()(d);
            }
        }
        CHECK(relative_error(module(x), expected) <= 1e-12);
    }
}

TEST_CASE_TEMPLATE("autoregressive attention: gradients by finite differences" * not_sanitized, Module,
                   Attention<plain>, Attention<full>, Attention<wide>) {
    const Cpu policy(1);
    Module module(policy, Seed{1});
    for (const Index length : {3, 13, 16}) {
        auto x = normal<double>(policy, std::array<Index, 3>{2, length, dim}, 0, 0.7);
        check_gradients(module, x, {});
        check_gradients(module, x, {}, AttentionCounts{.num_heavy_tokens_q = 9, .num_heavy_tokens_kv = 2});
        check_gradients(module, x, {}, AttentionCounts{.num_heavy_tokens_kv = 14});  // `plain` in two parts
    }
}

TEST_CASE("autoregressive attention: parts of the windows, batches and threads give the same bits") {
    const Cpu one(1), two(2);
    const Attention<straight, float> module(two, Seed{1}), other(one, Seed{1});
    const auto x = normal<float>(two, std::array<Index, 3>{3, 301, dim}, 0);
    const auto d_out = normal<float>(two, x.shape(), 1);
    const auto saved = module.forward(x);
    auto gradients = module.make_gradients();
    const auto d_x = module.backward(saved, d_out, gradients);
    CHECK(same_bits(module(x), saved.out));
    for (Index b = 0; b < 3; ++b) {
        const auto alone = other.forward(sequence(x, b));
        auto gradients_alone = other.make_gradients();
        CHECK(same_bits(alone.out, sequence(saved.out, b)));
        CHECK(same_bits(other.backward(alone, sequence(d_out, b), gradients_alone), sequence(d_x, b)));
    }
    CHECK(saved.heavy.indices.shape() == std::array<Index, 3>{6 * 76, 1, 5});
    CHECK(saved.sizes.windows_at_once() == 32);
    // With more keys, the parts are smaller. The order of all sums is that of the windows.
    const AttentionCounts counts{.num_heavy_tokens_kv = 80};
    const auto more = module.forward(x, {}, counts);
    CHECK(more.sizes.windows_at_once() == 22);
    auto gradients_more = module.make_gradients();
    const auto d_more = module.backward(more, d_out, gradients_more);
    const auto alone = other.forward(sequence(x, 1), {}, counts);
    auto gradients_alone = other.make_gradients();
    CHECK(same_bits(other.backward(alone, sequence(d_out, 1), gradients_alone), sequence(d_more, 1)));
}

TEST_CASE("autoregressive attention: sees later tokens of a window, and none of later windows") {
    const Cpu policy(2);
    const Attention<plain> module(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{1, 40, dim}, 0);
    const auto out = module(x);
    auto changed = copy_of(policy, x);
    for (Index i = 17; i < 40; ++i)
        for (Index d = 0; d < dim; ++d) changed.view()(0, i, d) = 3 * x.const_view()(0, 39 - i, d);
    const auto moved = module(changed);
    for (Index i = 0; i < 16; ++i) CHECK(same_bits(moved.const_view()[0][i], out.const_view()[0][i]));
    CHECK_FALSE(same_bits(moved.const_view()[0][17], out.const_view()[0][17]));
}

TEST_CASE("autoregressive attention: memory grows with the length and not with its square" * not_sanitized) {
    const auto peak = [](Index length) {
        const Cpu fresh(1, Cpu::usual_plan, Allocations::together);
        const Attention<straight, float> own(fresh, Seed{1});
        const auto x = normal<float>(fresh, std::array<Index, 3>{1, length, dim}, 0);
        auto gradients = own.make_gradients();
        own.backward(own.forward(x), x, gradients);
        return fresh.workspace()->statistics().peak;
    };
    CHECK(static_cast<double>(peak(8192)) < 2.2 * static_cast<double>(peak(4096)));
}

TEST_CASE("autoregressive attention: forward and backward take up to 12.5 times the memory of the tokens" *
          not_sanitized) {
    constexpr AutoregressiveAttentionConfig config{.dim = 128,
                                                   .num_heavy_tokens_q = 32,
                                                   .num_heavy_tokens_kv = 1024,
                                                   .num_routed_kv = 2,
                                                   .light_heads = 2,
                                                   .heavy_heads = 2,
                                                   .use_null_q_tokens = true};
    const Cpu policy(2, Cpu::usual_plan, Allocations::together);
    const Attention<config, float> module(policy, Seed{1});
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 8192, config.dim}, 0);
    auto gradients = module.make_gradients();
    const auto before = policy.workspace()->statistics().in_use;
    policy.workspace()->reset_peak();
    module.backward(module.forward(x), x, gradients);
    const auto taken = static_cast<double>(policy.workspace()->statistics().peak - before);
    CHECK(taken <= 12.5 * sizeof(float) * static_cast<double>(x.size()));
}

TEST_CASE("autoregressive attention: a second call allocates nothing new; errors name the argument") {
    const Cpu policy(2, Cpu::usual_plan, Allocations::together);  // under sanitizers, too
    const Attention<full, float> module(policy, Seed{1});
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 100, dim}, 0);
    auto gradients = module.make_gradients();
    const auto run = [&] { module.backward(module.forward(x), x, gradients); };
    run();
    run();
    const auto before = policy.workspace()->statistics().system_allocations;
    run();
    CHECK(policy.workspace()->statistics().system_allocations == before);
    const auto mask = mask_of_lengths(policy, {3, 100}, 100);
    CHECK_THROWS_WITH_AS(module(x, mask.const_view()),
                         "colt5: `mask` must be absent in autoregressive attention, but is given", ValueError);
    CHECK_THROWS_WITH_AS(module(x, {}, {.num_heavy_tokens_q = 0}), "colt5: `num_heavy_tokens_q` must be >= 1, but is 0",
                         ValueError);
    const TokensTensor<float, Cpu> none(policy, {2, 0, dim});
    CHECK(module(none).shape() == none.shape());
    auto of_none = module.make_gradients();
    CHECK(module.backward(module.forward(none), none, of_none).shape() == none.shape());
}
