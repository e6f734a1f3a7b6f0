// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <set>
#include <type_traits>
#include <vector>

#include <colt5/colt5.hpp>

#include "checks.hpp"
#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr RouterConfig of_blocks(RouterType type, Index route_block_size) {
    return {.dim = 5,
            .num_routing_tokens = 2,
            .straight_through = false,
            .router_type = type,
            .kwargs = {.route_block_size = route_block_size}};
}
/// Blocks of few tokens are not routed.
constexpr RouterConfig short_rows(Index route_block_size) {
    RouterConfig config = of_blocks(RouterType::coor_descent, route_block_size);
    config.kwargs.coor_descent.short_rows_score_one = true;
    return config;
}
/// A router in blocks of 8 tokens, and the same router of whole sequences.
template <typename In, typename Of>
struct Pair {
    using InBlocks = In;
    using Whole = Of;
};
template <RouterConfig in_blocks, RouterConfig whole>
using PairOf = Pair<ConfiguredRouter<in_blocks, double, Cpu>, ConfiguredRouter<whole, double, Cpu>>;
using CoorDescent = PairOf<of_blocks(RouterType::coor_descent, 8), of_blocks(RouterType::coor_descent, 0)>;
using CumSoftmax = PairOf<of_blocks(RouterType::cum_softmax, 8), of_blocks(RouterType::cum_softmax, 0)>;
using Gumbel = PairOf<of_blocks(RouterType::sinkhorn, 8), of_blocks(RouterType::sinkhorn, 0)>;
using ShortRows = PairOf<short_rows(8), short_rows(0)>;

static_assert(Router<CoorDescent::InBlocks, double, Cpu>);
static_assert(Router<CumSoftmax::InBlocks, double, Cpu>);
static_assert(Router<Gumbel::InBlocks, double, Cpu>);
static_assert(!IsLinearRouter<CoorDescent::InBlocks> && IsLinearRouter<CoorDescent::Whole>);

/// (batch, length): true where is_real(b, i)
template <typename F>
HostTensor<bool, 2> mask_of(const Cpu& policy, Index batch, Index length, F&& is_real) {
    HostTensor<bool, 2> mask(policy, {batch, length});
    for (Index b = 0; b < batch; ++b)
        for (Index i = 0; i < length; ++i) mask.view()(b, i) = is_real(b, i);
    return mask;
}

template <typename R>
void without_sinkhorn_noise(R& router) {
    if constexpr (requires { router.inner.noise; })
        router.inner.noise.source = GumbelNoise<double>::Source::none;
    else if constexpr (requires { router.noise; })
        router.noise.source = GumbelNoise<double>::Source::none;
}

}  // namespace

TEST_CASE_TEMPLATE("BlockRouter: each block is routed as a sequence of its own", Type, CoorDescent, CumSoftmax,
                   Gumbel) {
    const Cpu policy(1);
    auto router = make_router<typename Type::InBlocks>(policy);
    auto of_block = make_router<typename Type::Whole>(policy);
    without_sinkhorn_noise(router);
    without_sinkhorn_noise(of_block);
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 24, 5}, 1);
    const auto with_mask = mask_of(policy, 2, 24, [](Index b, Index i) { return b == 0 || i < 20 || i == 23; });
    const auto routing = router.route(policy, x.const_view(), with_mask.const_view(), 9);  // 3 of each block
    REQUIRE(routing.indices.shape() == std::array<Index, 3>{2, 2, 9});
    for (Index b = 0; b < 2; ++b)
        for (Index j = 0; j < 3; ++j) {
            const auto tokens = x.const_view()[b].range(8 * j, 8).reshape(std::array<Index, 3>{1, 8, 5});
            const auto real = with_mask.const_view()[b].range(8 * j, 8).reshape(std::array<Index, 2>{1, 8});
            const auto alone = of_block.route(policy, tokens, real, 3);
            for (Index r = 0; r < 2; ++r)
                for (Index i = 0; i < 3; ++i) {
                    CHECK(routing.indices.const_view()(b, r, 3 * j + i) == alone.indices.const_view()(0, r, i) + 8 * j);
                    CHECK(routing.scores.const_view()(b, r, 3 * j + i) == alone.scores.const_view()(0, r, i));
                }
        }
}

TEST_CASE_TEMPLATE("BlockRouter: routing tokens from outside are those of all blocks of a sample", Type, CoorDescent,
                   CumSoftmax, Gumbel) {
    const Cpu policy(1);
    for (const Index length : {16, 19}) {
        CAPTURE(length);
        auto router = make_router<typename Type::InBlocks>(policy);
        auto x = normal<double>(policy, std::array<Index, 3>{2, length, 5}, 1, 0.3);
        auto given = normal<double>(policy, std::array<Index, 3>{2, 2, 5}, 3);
        const auto d_scores = normal<double>(policy, std::array<Index, 3>{2, 2, 5}, 2);
        const auto with_mask = mask_of(policy, 2, length, [&](Index b, Index i) { return b == 0 || i + 2 < length; });
        const auto forward = [&] {
            if constexpr (requires { router.inner.noise; }) router.inner.noise.calls = 0;  // the same noise every time
            return router.forward(policy, x.const_view(), with_mask.const_view(), 5, given.const_view());
        };
        const auto saved = forward();
        typename Type::InBlocks::Gradients gradients{filled<double>(policy, router.inner.routing_token.shape(), 0)};
        auto d_x = filled<double>(policy, x.shape(), 0), d_given = filled<double>(policy, given.shape(), 1);
        router.backward(policy, saved, d_scores.const_view(), x.const_view(), with_mask.const_view(), d_x.view(),
                        gradients, given.const_view(), d_given.view());
        const auto loss = [&] { return inner(d_scores, forward().routing.scores); };
        CHECK(relative_error(d_x, finite_differences(policy, x, loss)) <= 1e-5);
        for (Index i = 0; i < d_given.size(); ++i) d_given.data()[i] -= 1;  // it accumulates
        CHECK(relative_error(d_given, finite_differences(policy, given, loss)) <= 1e-5);
        CHECK(inner(gradients.routing_token, gradients.routing_token) == 0);

        auto learned = make_router<typename Type::InBlocks>(policy);  // those of the second sample
        std::copy_n(given.const_view()[1].data(), 10, learned.inner.routing_token.data());
        without_sinkhorn_noise(router);
        without_sinkhorn_noise(learned);
        const auto routing = router.route(policy, x.const_view(), with_mask.const_view(), 5, given.const_view());
        const auto of_training = forward();
        CHECK(same_bits(routing.indices, of_training.routing.indices));
        CHECK(same_bits(routing.scores, of_training.routing.scores));
        const auto expected = learned.route(policy, x.const_view(), with_mask.const_view(), 5);
        CHECK(same_bits(sequence(routing.indices, 1), sequence(expected.indices, 1)));
        CHECK(same_bits(sequence(routing.scores, 1), sequence(expected.scores, 1)));
        CHECK(!same_bits(sequence(routing.indices, 0), sequence(expected.indices, 0)));
        CHECK_THROWS_WITH_AS(router.route(policy, x.const_view(), {}, 5, given.const_view().range(0, 1)),
                             "colt5: `routing_tokens` must have shape (2, any, 5), but has (1, 2, 5)", ShapeError);
        CHECK_THROWS_WITH_AS(
            router.backward(policy, saved, d_scores.const_view(), x.const_view(), with_mask.const_view(), d_x.view(),
                            gradients, given.const_view(), d_given.view().range(0, 1)),
            "colt5: `d_routing_tokens` must have shape (2, 2, 5), but has (1, 2, 5)", ShapeError);
    }
}

TEST_CASE("BlockRouter: exactly as many tokens as asked for, shared out to all blocks, the last partial one included") {
    const Cpu policy(1);
    const auto router = make_router<CoorDescent::InBlocks>(policy);
    for (const Index length : {1, 7, 8, 9, 16, 21, 24, 39, 40})
        for (const Index wanted : {1, 2, 3, 5, 8, 13, 21, 40, 50}) {
            CAPTURE(length);
            CAPTURE(wanted);
            const Index k = std::min(wanted, length);
            const auto x = normal<double>(policy, std::array<Index, 3>{2, length, 5}, 1);
            const auto routing = router.route(policy, x.const_view(), {}, wanted);
            REQUIRE(routing.indices.shape() == std::array<Index, 3>{2, 2, k});
            for (Index row = 0; row < 4; ++row) {
                const TokenIndex* const indices = routing.indices.data() + row * k;
                const std::set<TokenIndex> distinct(indices, indices + k);
                CHECK(static_cast<Index>(distinct.size()) == k);
                CHECK(*distinct.begin() >= 0);
                CHECK(*distinct.rbegin() < length);
                for (Index begin = 0; begin < length; begin += 8) {
                    const Index size = std::min(Index{8}, length - begin);
                    const auto here = std::count_if(indices, indices + k,
                                                    [&](TokenIndex i) { return i >= begin && i < begin + size; });
                    CHECK(std::abs(static_cast<double>(here) -
                                   static_cast<double>(k * size) / static_cast<double>(length)) < 1);
                }
            }
        }
}

TEST_CASE_TEMPLATE("BlockRouter: padding changes nothing", Type, CoorDescent, CumSoftmax, Gumbel, ShortRows) {
    const Cpu policy(2);
    auto router = make_router<typename Type::InBlocks>(policy);
    without_sinkhorn_noise(router);
    // The cumulative softmax sums what is not chosen, and in longer rows it chooses more.
    const double tolerance = std::is_same_v<Type, CumSoftmax> ? 1e-13 : 0;
    const Index padded = 47;
    for (const Index k : {1, 5, 9, 30}) {
        CAPTURE(k);
        const std::vector<Index> lengths{21, 40, 3, 16, 0, 47, 8};
        const auto batch = static_cast<Index>(lengths.size());
        auto x = normal<double>(policy, std::array<Index, 3>{batch, padded, 5}, 1);
        // The last sample but one also has masked tokens among the real ones.
        const auto with_mask = mask_of(policy, batch, padded, [&](Index b, Index i) {
            return i < lengths[static_cast<std::size_t>(b)] && (b != 1 || i == 39 || i % 3 != 1);
        });
        for (Index b = 0; b < batch; ++b)
            for (Index i = lengths[static_cast<std::size_t>(b)]; i < padded; ++i)
                for (Index j = 0; j < 5; ++j) x.view()(b, i, j) = 1e3;
        const auto d_scores = normal<double>(policy, std::array<Index, 3>{batch, 2, k}, 2);
        const auto saved = router.forward(policy, x.const_view(), with_mask.const_view(), k);
        CHECK(same_bits(router.route(policy, x.const_view(), with_mask.const_view(), k).scores, saved.routing.scores));
        typename Type::InBlocks::Gradients gradients{filled<double>(policy, router.inner.routing_token.shape(), 0)},
            expected{filled<double>(policy, router.inner.routing_token.shape(), 0)};
        auto d_x = filled<double>(policy, x.shape(), 0);
        router.backward(policy, saved, d_scores.const_view(), x.const_view(), with_mask.const_view(), d_x.view(),
                        gradients);
        for (Index b = 0; b < batch; ++b) {
            CAPTURE(b);
            const Index length = lengths[static_cast<std::size_t>(b)], picks = std::min(k, length);
            const TokensView<const double> tokens(x.const_view()[b].data(), {1, length, 5});
            const Mask mask = b == 1 ? Mask(with_mask.const_view()[b].data(), {1, length}) : Mask();
            HostTensor<double, 3> d_picked(policy, {1, 2, picks}), d_tokens = filled<double>(policy, tokens.shape(), 0);
            for (Index r = 0; r < 2; ++r)
                for (Index i = 0; i < picks; ++i) d_picked.view()(0, r, i) = d_scores.const_view()(b, r, i);
            const auto alone = router.forward(policy, tokens, mask, k);
            REQUIRE(alone.routing.indices.shape() == d_picked.shape());
            for (Index r = 0; r < 2; ++r) {
                std::set<TokenIndex> rest;
                for (Index i = 0; i < k; ++i) {
                    const TokenIndex index = saved.routing.indices.const_view()(b, r, i);
                    const double score = saved.routing.scores.const_view()(b, r, i);
                    if (i < picks) {
                        CHECK(index == alone.routing.indices.const_view()(0, r, i));
                        CHECK(std::abs(score - alone.routing.scores.const_view()(0, r, i)) <= tolerance);
                    } else {
                        CHECK((index >= length && index < padded));
                        CHECK(rest.insert(index).second);
                        CHECK(score == 0);
                    }
                }
            }
            if (length == 0) continue;
            router.backward(policy, alone, d_picked.const_view(), tokens, mask, d_tokens.view(), expected);
            const TokensView<const double> d_of_batch(d_x.const_view()[b].data(), tokens.shape());
            CHECK(relative_error(d_of_batch, d_tokens) <= tolerance);
            CHECK(std::all_of(d_of_batch.data() + length * 5, d_of_batch.data() + padded * 5,
                              [](double d) { return d == 0; }));
        }
        CHECK(relative_error(gradients.routing_token, expected.routing_token) <= 1e-13);
    }
}

TEST_CASE_TEMPLATE("BlockRouter: gradients are those of finite differences, in whole and in partial blocks", Type,
                   CoorDescent, CumSoftmax, Gumbel) {
    const Cpu policy(1);
    auto router = make_router<typename Type::InBlocks>(policy);
    const auto forward = [&](const auto& x, Mask mask, Index k) {
        if constexpr (requires { router.inner.noise; }) router.inner.noise.calls = 0;  // the same noise every time
        return router.forward(policy, x.const_view(), mask, k);
    };
    for (const Index length : {5, 16, 19}) {
        CAPTURE(length);
        auto x = normal<double>(policy, std::array<Index, 3>{2, length, 5}, 1, 0.3);
        const auto with_mask = mask_of(policy, 2, length, [&](Index b, Index i) { return b == 0 || i + 2 < length; });
        const Index k = 5;
        const auto d_scores = normal<double>(policy, std::array<Index, 3>{2, 2, k}, 2);
        const auto saved = forward(x, with_mask.const_view(), k);
        typename Type::InBlocks::Gradients gradients{filled<double>(policy, router.inner.routing_token.shape(), 0)};
        auto d_x = filled<double>(policy, x.shape(), 0);
        router.backward(policy, saved, d_scores.const_view(), x.const_view(), with_mask.const_view(), d_x.view(),
                        gradients);
        const auto loss = [&] { return inner(d_scores, forward(x, with_mask.const_view(), k).routing.scores); };
        CHECK(relative_error(d_x, finite_differences(policy, x, loss)) <= 1e-5);
        CHECK(relative_error(gradients.routing_token, finite_differences(policy, router.inner.routing_token, loss)) <=
              1e-5);
    }
}

TEST_CASE(
    "BlockRouter: in modules, a batch gives what each sample gives alone, and parameters have the reference's names") {
    const Cpu policy(2);
    constexpr FeedForwardConfig config{
        .dim = 16, .num_heavy_tokens = 7, .router_straight_through = false, .router_kwargs = {.route_block_size = 8}};
    const ConditionalRoutedFeedForward<config, float, Cpu> module(policy, Seed{1});
    std::set<std::string> names;
    module.each_parameter([&](const std::string& name, const auto&) { names.insert(name); }, "", module);
    CHECK(names.contains("router.routing_token"));
    const auto x = normal<float>(policy, std::array<Index, 3>{3, 21, 16}, 0);
    const auto d_out = normal<float>(policy, x.shape(), 1);
    auto gradients = module.make_gradients();
    const auto saved = module.forward(x);
    const auto d_x = module.backward(saved, d_out, gradients);
    for (Index b = 0; b < 3; ++b) {
        const auto one = sequence(x, b);
        const auto alone = module.forward(one);
        CHECK(same_bits(alone.out, sequence(saved.out, b)));
        auto d = module.make_gradients();
        CHECK(same_bits(module.backward(alone, sequence(d_out, b), d), sequence(d_x, b)));
    }
}

TEST_CASE("BlockRouter: in modules, padding changes nothing") {
    const Cpu policy(2);
    constexpr FeedForwardConfig config{.dim = 16, .num_heavy_tokens = 8, .router_kwargs = {.route_block_size = 16}};
    constexpr AttentionConfig attention_config{.dim = 16,
                                               .num_heavy_tokens_q = 8,
                                               .num_heavy_tokens_kv = 20,
                                               .num_routed_kv = 2,
                                               .light_dim_head = 8,
                                               .light_heads = 2,
                                               .light_window_size = 8,
                                               .heavy_dim_head = 8,
                                               .heavy_heads = 2,
                                               .router_straight_through = false,
                                               .router_kwargs = {.route_block_size = 16},
                                               .use_null_q_tokens = true};
    const auto check = [&](const auto& module) {
        const auto x = normal<float>(policy, std::array<Index, 3>{1, 32, 16}, 0),
                   d_out = normal<float>(policy, x.shape(), 1);
        auto padded = filled<float>(policy, std::array<Index, 3>{1, 71, 16}, NAN);
        auto d_padded = filled<float>(policy, padded.shape(), 0);
        std::copy_n(x.data(), x.size(), padded.data());
        std::copy_n(d_out.data(), d_out.size(), d_padded.data());
        const auto mask = mask_of(policy, 1, 71, [](Index, Index i) { return i < 32; });
        const auto alone = module.forward(x);
        const auto saved = module.forward(padded, mask);
        auto gradients = module.make_gradients();
        const auto d_x = module.backward(saved, d_padded, gradients),
                   expected = module.backward(alone, d_out, gradients);
        CHECK(std::equal(alone.out.data(), alone.out.data() + x.size(), saved.out.data()));
        CHECK(relative_error(d_x.const_view().rows().range(0, 32), expected.const_view().rows()) <= 1e-5);
    };
    check(ConditionalRoutedFeedForward<config, float, Cpu>(policy, Seed{1}));
    check(ConditionalRoutedAttention<attention_config, float, Cpu>(policy, Seed{1}));
}
