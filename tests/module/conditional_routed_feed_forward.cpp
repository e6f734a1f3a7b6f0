// SPDX-License-Identifier: MIT
#include <colt5/module/conditional_routed_feed_forward.hpp>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr FeedForwardConfig with(RouterType type, bool straight_through) {
    return {.dim = 5,
            .num_heavy_tokens = 3,
            .light_ff_mult = 0.5,
            .heavy_ff_mult = 1.5,
            .router_straight_through = straight_through,
            .router_type = type};
}
constexpr FeedForwardConfig descent = with(RouterType::coor_descent, false),
                            cum_softmax_soft = with(RouterType::cum_softmax, false),
                            sinkhorn_soft = with(RouterType::sinkhorn, false),
                            straight = with(RouterType::coor_descent, true);
template <FeedForwardConfig config, typename Scalar = double>
using FF = ConditionalRoutedFeedForward<config, Scalar, Cpu>;

/// Light for every token, heavy times the score for the chosen ones.
template <typename Module>
TokensTensor<double, Cpu> naive(const Module& module, const TokensTensor<double, Cpu>& x, Mask mask, Index k) {
    const Cpu& policy = module.policy();
    const auto routing = module.router.route(policy, x.const_view(), mask, k);
    auto out = tensor_like(policy, x);
    for (Index b = 0; b < x.extent(0); ++b)
        for (Index i = 0; i < x.extent(1); ++i) {
            Row y = evaluate(module.light_ff, row_of(x, b, i));
            const Row heavy = evaluate(module.heavy_ff, row_of(x, b, i));
            double score = 0, picks = 0;
            for (Index j = 0; j < routing.indices.extent(2); ++j) {
                if (routing.indices.const_view()(b, 0, j) != i) continue;
                score += routing.scores.const_view()(b, 0, j);
                picks += 1;
            }
            for (std::size_t e = 0; e < y.size(); ++e)
                out.view()(b, i, e) = y[e] + (picks > 0 ? score / picks : 0) * heavy[e];
        }
    return out;
}

template <typename Module>
void check_values(const Module& module, const TokensTensor<double, Cpu>& x, Mask some) {
    for (const Mask mask : {Mask(), some})
        for (const Index k : {1, 3, 9, 12})
            CHECK(relative_error(module(x, mask, FeedForwardCounts{k}), naive(module, x, mask, k)) <= 1e-12);
    CHECK(same_bits(module(x), module(x, {}, FeedForwardCounts{3})));
}

}  // namespace

TEST_CASE("ConditionalRoutedFeedForward: light for all, heavy for the chosen; several picks of a token are averaged") {
    const Cpu policy(2);
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 9, 5}, 0);
    const auto some = random_mask(policy, std::array<Index, 2>{2, 9}, 1);
    check_values(FF<straight>(policy, Seed{1}), x, some.const_view());
    check_values(FF<cum_softmax_soft>(policy, Seed{1}), x, some.const_view());
    const FF<sinkhorn_soft> sinkhorn(policy, Seed{1});
    const auto noise_of = [&](Index k) {
        HostTensor<double, 3> noise(policy, {2, k, 9});
        const Random random(Seed{5});
        fill_with(policy, noise, [&](std::size_t i) { return random.gumbel(i); });
        return noise;
    };
    bool repeated = false;
    for (const Mask mask : {Mask(), some.const_view()})
        for (const Index k : {1, 3, 9}) {
            const auto noise = noise_of(k);
            sinkhorn.router.noise = GumbelNoise<double>::given(noise.const_view());
            CHECK(relative_error(sinkhorn(x, mask, {.num_heavy_tokens = k}), naive(sinkhorn, x, mask, k)) <= 1e-12);
            auto picks = to_host(policy, sinkhorn.router.route(policy, x.const_view(), mask, k).indices);
            std::sort(picks.begin(), picks.begin() + k);
            repeated = repeated || std::adjacent_find(picks.begin(), picks.begin() + k) != picks.begin() + k;
        }
    CHECK(repeated);  // or the mean was not tested
}

TEST_CASE_TEMPLATE("ConditionalRoutedFeedForward: gradients by finite differences" * not_sanitized, Module, FF<descent>,
                   FF<cum_softmax_soft>, FF<sinkhorn_soft>) {
    const Cpu policy(1);
    Module module(policy, Seed{1});
    HostTensor<double, 3> noise;
    const auto draw = [&](Index batch, Index k, Index length) {
        if constexpr (Module::TokenRouter::picks_repeat) {
            noise = HostTensor<double, 3>(policy, {batch, k, length});
            const Random random(Seed{5});
            fill_with(policy, noise, [&](std::size_t i) { return random.gumbel(i); });
            module.router.noise = GumbelNoise<double>::given(noise.const_view());
        }
    };
    auto x = normal<double>(policy, std::array<Index, 3>{2, 7, 5}, 0, 0.7);
    const auto mask = mask_of_lengths(policy, {6, 2}, 7);
    draw(2, 3, 7);
    check_gradients(module, x, {});
    check_gradients(module, x, mask.const_view());
    draw(2, 5, 7);
    check_gradients(module, x, mask.const_view(), FeedForwardCounts{.num_heavy_tokens = 5});
    for (const Index length : {1, 3}) {  // n <= k
        auto shorter = resized(policy, x, length);
        draw(2, length, length);
        check_gradients(module, shorter, {});
        const auto shorter_mask = mask_of_lengths(policy, {length, 0}, length);
        check_gradients(module, shorter, shorter_mask.const_view());
    }
}

TEST_CASE("ConditionalRoutedFeedForward: errors name the argument and both shapes or values") {
    const Cpu policy(1);
    const FF<straight, float> module(policy);
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 4, 5}, 0);
    const auto wide = normal<float>(policy, std::array<Index, 3>{2, 4, 6}, 0);
    const auto longer = normal<float>(policy, std::array<Index, 3>{2, 5, 5}, 0);
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 3}, 1);
    CHECK_THROWS_WITH_AS(module(wide), "colt5: `tokens` must have shape (any, any, 5), but has (2, 4, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(module.forward(wide), "colt5: `tokens` must have shape (any, any, 5), but has (2, 4, 6)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(module(x, mask.const_view()), "colt5: `mask` must have shape (2, 4), but has (2, 3)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(module(x, {}, {.num_heavy_tokens = 0}), "colt5: `num_heavy_tokens` must be >= 1, but is 0",
                         ValueError);
    const auto saved = module.forward(x);
    auto gradients = module.make_gradients();
    CHECK_THROWS_WITH_AS(module.backward(saved, wide, gradients),
                         "colt5: `d_out` must have shape (any, any, 5), but has (2, 4, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(module.backward(saved, longer, gradients),
                         "colt5: `d_out` must have shape (2, 4, 5), but has (2, 5, 5)", ShapeError);
}
