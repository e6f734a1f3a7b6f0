// SPDX-License-Identifier: MIT
#include <colt5/module/conditional_routed_cross_attention.hpp>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr CrossAttentionConfig with(RouterType type, bool straight_through) {
    return {.dim = 5,
            .num_tokens_q = 3,
            .num_tokens_kv = 4,
            .dim_head = 3,
            .heads = 2,
            .router_straight_through = straight_through,
            .router_type = type,
            .kv_routing_tokens = 2};
}
constexpr CrossAttentionConfig soft = with(RouterType::coor_descent, false);
constexpr CrossAttentionConfig conditioned = [] {
    CrossAttentionConfig config = soft;
    config.condition_kv_routing_on_queries = true;
    return config;
}();
constexpr CrossAttentionConfig conditioned_by_cosine = [] {
    CrossAttentionConfig config = conditioned;
    config.router_type = RouterType::cum_softmax;
    config.router_kwargs.cum_softmax = {.temperature = 3, .cosine_sim_routing = true};
    return config;
}();
constexpr CrossAttentionConfig in_blocks = [] {
    CrossAttentionConfig config = soft;
    config.route_block_size = 3;
    return config;
}();
constexpr CrossAttentionConfig conditioned_in_blocks = [] {
    CrossAttentionConfig config = conditioned;
    config.route_block_size = 3;
    return config;
}();
constexpr CrossAttentionConfig by_sinkhorn = with(RouterType::sinkhorn, false);
template <CrossAttentionConfig config, typename Scalar = double>
using Cross = ConditionalRoutedCrossAttention<config, Scalar, Cpu>;

template <typename Module>
void check_cross_gradients(Module& module, TokensTensor<double, Cpu>& x, TokensTensor<double, Cpu>& context, Mask mask,
                           Mask context_mask, const CrossAttentionCounts& counts = {}) {
    const Cpu& policy = module.policy();
    const auto d_out = normal<double>(policy, x.shape(), 99);
    const auto saved = module.forward(x, context, mask, context_mask, counts);
    CHECK(same_bits(saved.out, module(x, context, mask, context_mask, counts)));
    auto gradients = module.make_gradients();
    const auto d = module.backward(saved, d_out, gradients);
    if (is_sanitized) return;  // the loss calls no other code, and often
    const auto loss = [&] { return inner(d_out, module(x, context, mask, context_mask, counts)); };
    CHECK(gradient_error(d.d_x, finite_differences(policy, x, loss)) <= gradient_tolerance);
    CHECK(gradient_error(d.d_context, finite_differences(policy, context, loss)) <= gradient_tolerance);
    check_parameter_gradients(policy, module, gradients, loss);
}

}  // namespace

TEST_CASE_TEMPLATE(
    "ConditionalRoutedCrossAttention: gradients by finite differences, queries and context routed or not", Module,
    Cross<soft>, Cross<conditioned>, Cross<conditioned_by_cosine>, Cross<in_blocks>, Cross<conditioned_in_blocks>) {
    const Cpu policy(1);
    Module module(policy, Seed{1});
    auto x = normal<double>(policy, std::array<Index, 3>{2, 7, 5}, 0, 0.7);
    auto context = normal<double>(policy, std::array<Index, 3>{2, 8, 5}, 1, 0.7);
    const auto mask = mask_of_lengths(policy, {5, 2}, 7);
    const auto context_mask = mask_of_lengths(policy, {3, 8}, 8);
    for (const Index num_q : {3, 7})
        for (const Index num_kv : {4, 8}) {
            CAPTURE(num_q);
            CAPTURE(num_kv);
            const CrossAttentionCounts counts{num_q, num_kv};
            const auto saved = module.forward(x, context, {}, {}, counts);
            CHECK(saved.routed_q.has_value() == (num_q < 7));
            CHECK(saved.routed_kv.has_value() == (num_kv < 8));
            check_cross_gradients(module, x, context, {}, {}, counts);
            check_cross_gradients(module, x, context, mask.const_view(), context_mask.const_view(), counts);
        }
    auto one_query = resized(policy, x, 1), one_token = resized(policy, context, 1);
    check_cross_gradients(module, one_query, one_token, {}, {});
    const auto none = mask_of_lengths(policy, {0, 1}, 1);
    check_cross_gradients(module, one_query, one_token, none.const_view(), none.const_view());
}

TEST_CASE("ConditionalRoutedCrossAttention: values, queries and context routed or not") {
    const Cpu policy(2);
    const Cross<soft> module(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 7, 5}, 0);
    const auto context = normal<double>(policy, std::array<Index, 3>{2, 8, 5}, 1);
    const auto mask = mask_of_lengths(policy, {5, 2}, 7);
    for (const Index num_q : {3, 7})
        for (const Index num_kv : {4, 8}) {
            const auto out = module(x, context, mask.const_view(), {}, {num_q, num_kv});
            auto expected = filled<double>(policy, x.shape(), 0);
            const auto q = module.q_router.route(policy, x.const_view(), mask.const_view(), num_q);
            const auto kv = module.kv_router.route(policy, context.const_view(), {}, num_kv);
            for (Index b = 0; b < 2; ++b)
                for (Index i = 0; i < num_q; ++i) {
                    const Index token = num_q < 7 ? q.indices.const_view()(b, 0, i) : i;
                    if (!mask.const_view()(b, token)) continue;
                    const TokensView<const double> query(&x.const_view()(b, token, 0), {1, 1, 5});
                    HostTensor<double, 4> keys(policy, {1, num_kv < 8 ? 2 : 1, num_kv, 5});
                    for (Index r = 0; r < keys.extent(1); ++r)
                        for (Index j = 0; j < num_kv; ++j) {
                            const Index key = num_kv < 8 ? kv.indices.const_view()(b, r, j) : j;
                            std::copy_n(&context.const_view()(b, key, 0), 5, &keys.view()(0, r, j, 0));
                        }
                    const auto scores = num_kv < 8 ? sequence(kv.scores, b) : TokensView<const double>();
                    const auto heavy = module.heavy_attn.forward(policy, query, keys, {}, scores);
                    for (Index e = 0; e < 5; ++e)
                        expected.view()(b, token, e) =
                            (num_q < 7 ? q.scores.const_view()(b, 0, i) : 1) * heavy.out.data()[e];
                }
            CHECK(relative_error(out, expected) <= 1e-12);
        }
}

TEST_CASE(
    "ConditionalRoutedCrossAttention: conditioned on the queries, other queries route other tokens of the context") {
    const Cpu policy(1);
    const Cross<conditioned> module(policy, Seed{1});
    Cross<soft> plain(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 7, 5}, 0);
    const auto other = normal<double>(policy, x.shape(), 7);
    const auto context = normal<double>(policy, std::array<Index, 3>{2, 60, 5}, 1);
    const auto chosen = [&](const auto& of, const auto& queries) {
        const auto saved = of.forward(queries, context);
        return support::copy_of(policy, saved.routed_kv->routing.indices);
    };
    CHECK(same_bits(chosen(plain, x), chosen(plain, other)));
    CHECK(!same_bits(chosen(module, x), chosen(module, other)));
    // attention that gives zeros leaves the learned routing tokens
    Cross<conditioned> zeros(policy, Seed{1});
    fill(policy, zeros.kv_routing_tokens.attn.to_out.weight, 0);
    CHECK(same_bits(chosen(zeros, x), chosen(plain, x)));
    CHECK(same_bits(zeros(x, context), plain(x, context)));
}

TEST_CASE("ConditionalRoutedCrossAttention: Sinkhorn routing works, its gradients are those of finite differences") {
    const Cpu policy(1);
    Cross<by_sinkhorn> module(policy, Seed{1});
    auto x = normal<double>(policy, std::array<Index, 3>{2, 7, 5}, 0, 0.7);
    auto context = normal<double>(policy, std::array<Index, 3>{2, 8, 5}, 1, 0.7);
    const auto mask = mask_of_lengths(policy, {5, 2}, 7);
    const auto context_mask = mask_of_lengths(policy, {3, 8}, 8);
    HostTensor<double, 3> q_noise(policy, {2, 3, 7}), kv_noise(policy, {4, 4, 8});
    fill_with(policy, q_noise, [&](std::size_t i) { return Random(Seed{5}).gumbel(i); });
    fill_with(policy, kv_noise, [&](std::size_t i) { return Random(Seed{6}).gumbel(i); });
    module.q_router.noise = GumbelNoise<double>::given(q_noise.const_view());
    module.kv_router.noise = GumbelNoise<double>::given(kv_noise.const_view());
    check_cross_gradients(module, x, context, {}, {});
    check_cross_gradients(module, x, context, mask.const_view(), context_mask.const_view());
    const auto saved = module.forward(x, context);
    auto gradients = module.make_gradients();
    module.backward(saved, x, gradients);
    CHECK(gradient_norm<Cross<by_sinkhorn>>(gradients, "q_router.routing_token") > 1e-4);
    CHECK(gradient_norm<Cross<by_sinkhorn>>(gradients, "kv_router.routing_token") > 1e-4);
}

TEST_CASE("ConditionalRoutedCrossAttention: keys and values come from the context") {
    const Cpu policy(2);
    const Cross<soft> module(policy, Seed{1});
    auto x = normal<double>(policy, std::array<Index, 3>{1, 7, 5}, 0);
    auto context = normal<double>(policy, std::array<Index, 3>{1, 8, 5}, 1);
    const auto before = module.forward(x, context);
    const auto queries = to_host(policy, before.routed_q->routing.indices);
    const auto keys = to_host(policy, before.routed_kv->routing.indices);

    for (const auto key : keys) {  // a routed token of the context moves every chosen query
        auto other = support::copy_of(policy, context);
        other.view()(0, key, 0) += 1e-3;
        const auto out = module(x, other);
        for (const auto query : queries)
            CHECK_FALSE(same_bits(out.const_view()[0][query], before.out.const_view()[0][query]));
    }
    auto other = support::copy_of(policy, x);  // a query that was not chosen moves no key
    for (Index i = 0; i < 7; ++i)
        if (std::find(queries.begin(), queries.end(), i) == queries.end())
            for (Index e = 0; e < 5; ++e) other.view()(0, i, e) *= 0.999;
    const auto after = module.forward(other, context);
    CHECK(to_host(policy, after.routed_q->routing.indices) == queries);
    CHECK(same_bits(after.heavy.kv, before.heavy.kv));
    for (Index i = 0; i < 7; ++i)
        if (std::find(queries.begin(), queries.end(), i) == queries.end())
            CHECK(all_zero(after.out.const_view()[0][i]));
}

TEST_CASE("ConditionalRoutedCrossAttention: masked queries get zeros and no gradient, routed or not") {
    const Cpu policy(2);
    const Cross<soft> module(policy, Seed{1});
    const auto context = normal<double>(policy, std::array<Index, 3>{2, 8, 5}, 1);
    for (const Index length : {2, 3, 7}) {
        const auto x = normal<double>(policy, std::array<Index, 3>{2, length, 5}, 0);
        const auto mask = mask_of_lengths(policy, {1, 0}, length);
        const auto saved = module.forward(x, context, mask.const_view());
        CHECK_FALSE(all_zero(saved.out.const_view()[0][0]));
        auto gradients = module.make_gradients();
        const auto d = module.backward(saved, normal<double>(policy, x.shape(), 2), gradients);
        for (Index b = 0; b < 2; ++b)
            for (Index i = 1 - b; i < length; ++i) {
                CHECK(all_zero(saved.out.const_view()[b][i]));
                CHECK(all_zero(d.d_x.const_view()[b][i]));
            }
        CHECK(all_zero(d.d_context.const_view()[1]));  // nobody asked
        CHECK_FALSE(all_zero(d.d_context.const_view()[0]));
    }
}

TEST_CASE("ConditionalRoutedCrossAttention: a fully masked context gives zeros and no gradient") {
    const Cpu policy(2);
    const Cross<soft> module(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{1, 7, 5}, 0);
    for (const Index length : {3, 8}) {
        const auto context = normal<double>(policy, std::array<Index, 3>{1, length, 5}, 1);
        const auto none = mask_of_lengths(policy, {0}, length);
        const auto saved = module.forward(x, context, {}, none.const_view());
        CHECK(all_zero(saved.out));
        auto gradients = module.make_gradients();
        const auto d = module.backward(saved, normal<double>(policy, x.shape(), 2), gradients);
        CHECK(all_zero(d.d_x));
        CHECK(all_zero(d.d_context));
        Cross<soft>::each_parameter(
            [](const std::string& name, const auto& gradient) {
                CAPTURE(name);
                CHECK(all_zero(gradient));
            },
            "", gradients);
    }
}

TEST_CASE("ConditionalRoutedCrossAttention: errors name the argument and both shapes or values") {
    const Cpu policy(1);
    const Cross<soft> module(policy);
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 4, 5}, 0);
    const auto wide = normal<double>(policy, std::array<Index, 3>{2, 4, 6}, 0);
    const auto one = normal<double>(policy, std::array<Index, 3>{1, 9, 5}, 0);
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 9}, 1);
    CHECK_THROWS_WITH_AS(module(wide, x), "colt5: `x` must have shape (any, any, 5), but has (2, 4, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(module(x, wide), "colt5: `context` must have shape (any, any, 5), but has (2, 4, 6)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(module(x, one), "colt5: `context` must have shape (2, any, 5), but has (1, 9, 5)", ShapeError);
    CHECK_THROWS_WITH_AS(module(x, x, mask.const_view()), "colt5: `mask` must have shape (2, 4), but has (2, 9)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(module(x, x, {}, mask.const_view()),
                         "colt5: `context_mask` must have shape (2, 4), but has (2, 9)", ShapeError);
    CHECK_THROWS_WITH_AS(module(x, x, {}, {}, {.num_tokens_q = 0}), "colt5: `num_tokens_q` must be >= 1, but is 0",
                         ValueError);
    CHECK_THROWS_WITH_AS(module(x, x, {}, {}, {.num_tokens_kv = 0}), "colt5: `num_tokens_kv` must be >= 1, but is 0",
                         ValueError);
    const auto saved = module.forward(x, x);
    auto gradients = module.make_gradients();
    CHECK_THROWS_WITH_AS(module.backward(saved, one, gradients),
                         "colt5: `d_out` must have shape (2, 4, 5), but has (1, 9, 5)", ShapeError);
}
