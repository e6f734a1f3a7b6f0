// SPDX-License-Identifier: MIT
/// Several routes of queries: each chooses queries for its share of the heads.
#include <cmath>
#include <map>
#include <set>
#include <string>
#include <vector>

#include <colt5/module/conditional_routed_cross_attention.hpp>

#include "module/invariances.hpp"
#include "router/norm_router.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr Index dim = 5, dim_head = 4, length = 12;

constexpr AttentionConfig plain(RouterType type, Index heads, Index num_routed_q, Index num_routed_kv) {
    return {.dim = dim,
            .num_heavy_tokens_q = 3,
            .num_heavy_tokens_kv = 4,
            .num_routed_kv = num_routed_kv,
            .num_routed_q = num_routed_q,
            .light_dim_head = 2,
            .light_heads = 2,
            .light_window_size = 4,
            .heavy_dim_head = dim_head,
            .heavy_heads = heads,
            .router_straight_through = false,
            .router_type = type};
}
/// With all that the heavy branch can have.
constexpr AttentionConfig full(RouterType type, Index heads, Index num_routed_q, Index num_routed_kv) {
    AttentionConfig config = plain(type, heads, num_routed_q, num_routed_kv);
    config.use_null_kv = config.use_null_q_tokens = true;
    config.multiply_keys_by_score = config.multiply_queries_by_score = true;
    config.rotary_emb = config.use_relative_position_bias = true;
    config.relative_position_num_buckets = 8;
    config.relative_position_max_distance = 6;
    return config;
}
constexpr auto descent = RouterType::coor_descent;
constexpr AttentionConfig two_of_four = full(descent, 4, 2, 1), one_a_head = full(descent, 4, 4, 2),
                          more_keys = full(descent, 4, 2, 4), alike = full(descent, 2, 2, 2),
                          without_options = plain(descent, 2, 2, 1),
                          by_softmax = plain(RouterType::cum_softmax, 2, 2, 2),
                          by_sinkhorn = full(RouterType::sinkhorn, 2, 2, 2), one_route = full(descent, 4, 1, 1);
constexpr AttentionConfig heavy_alone = [] {
    AttentionConfig config = full(descent, 2, 2, 1);
    config.has_light_attn = false;
    config.masked_tokens_get_null_q = true;
    config.router_kwargs.route_block_size = 5;
    return config;
}();
template <AttentionConfig config, typename Scalar = double,
          template <RouterConfig, typename, typename> class RouterTemplate = ConfiguredRouter>
using Attention = ConditionalRoutedAttention<config, Scalar, Cpu, RouterTemplate>;

using OfUser = Attention<without_options, double, NormRouter>;

constexpr CrossAttentionConfig of_cross{.dim = dim,
                                        .num_tokens_q = 3,
                                        .num_tokens_kv = 4,
                                        .dim_head = 3,
                                        .heads = 4,
                                        .router_straight_through = false,
                                        .kv_routing_tokens = 2,
                                        .q_routing_tokens = 4,
                                        .use_null_kv = true,
                                        .use_null_q_tokens = true,
                                        .multiply_keys_by_score = true,
                                        .use_relative_position_bias = true,
                                        .relative_position_num_buckets = 8,
                                        .relative_position_max_distance = 6};
using Cross = ConditionalRoutedCrossAttention<of_cross, double, Cpu>;
using CrossOfUser = ConditionalRoutedCrossAttention<of_cross, double, Cpu, NormRouter>;

/// A module whose tables and null tokens hold larger numbers than those at the start.
template <typename Module>
Module drawn(const Cpu& policy) {
    Module module(policy, Seed{1});
    std::uint64_t stream = 500;
    Module::each_parameter(
        [&](const std::string& name, auto& value) {
            if (name.find("bias") != std::string::npos || name.find("gamma") != std::string::npos)
                fill_normal(policy, value, Random(Seed{3}, ++stream));
        },
        "", module);
    return module;
}

Row rotated(const Row& x, Index position) {
    const std::size_t pairs = x.size() / 2;
    Row y(x);
    for (std::size_t i = 0; i < pairs; ++i) {
        const double frequency = std::pow(10000.0, -2 * static_cast<double>(i) / static_cast<double>(x.size()));
        const double angle = static_cast<double>(position) * frequency;
        y[i] = x[i] * std::cos(angle) - x[i + pairs] * std::sin(angle);
        y[i + pairs] = x[i + pairs] * std::cos(angle) + x[i] * std::sin(angle);
    }
    return y;
}
Row times(Row x, double factor) {
    for (double& e : x) e *= factor;
    return x;
}

/// The logits' bias as one more entry of queries and keys; attend divides by the root of their number.
Row attend_with_bias(const Row& q, std::vector<Row> keys, std::vector<Row> values, const Row& biases) {
    const double root = std::sqrt(static_cast<double>(q.size() + 1));
    Row query = times(q, root / std::sqrt(static_cast<double>(q.size())));
    query.push_back(root);
    for (std::size_t j = 0; j < keys.size(); ++j) {
        keys[j].push_back(biases[j]);
        values[j].push_back(0);
    }
    Row out = attend(query, keys, values, Row(keys.size(), 1.0));
    out.pop_back();
    return out;
}

/// Parameters of `to` as those of `from`, with the routing token of the queries for each of two routes.
template <typename From, typename To>
void copy_to_two_routes(const From& from, To& to) {
    const Cpu& policy = to.policy();
    std::map<std::string, std::vector<double>> values;
    From::each_parameter([&](const std::string& name, const auto& value) { values[name] = to_host(policy, value); }, "",
                         from);
    To::each_parameter(
        [&](const std::string& name, auto& value) {
            auto numbers = values.at(name);
            if (name == "q_router.routing_token") numbers.insert(numbers.end(), numbers.begin(), numbers.end());
            value = from_host<std::remove_reference_t<decltype(value)>>(policy, value.shape(), numbers);
        },
        "", to);
}

/// What the definition gives, head by head: each head's output of each query of its route, through the head's columns
/// of to_out, times the query's score, at the query's token.
template <AttentionConfig config>
TokensTensor<double, Cpu> naive(const Attention<config>& module, const TokensTensor<double, Cpu>& x, Mask mask,
                                const AttentionCounts& counts) {
    const Cpu& policy = module.policy();
    const auto& heavy = module.heavy_attn;
    const auto q = module.q_router.route(policy, x.const_view(), mask, *counts.num_heavy_tokens_q);
    const auto kv = module.kv_router.route(policy, x.const_view(), mask, *counts.num_heavy_tokens_kv);
    auto out = module.light_attn(policy, x, mask);
    const Index heads = config.heavy_heads, picks = q.indices.extent(2);
    const RelativePositionBuckets buckets{config.relative_position_num_buckets, config.relative_position_max_distance};
    for (Index b = 0; b < x.extent(0); ++b) {
        std::vector<bool> chosen(static_cast<std::size_t>(x.extent(1)));
        for (Index h = 0; h < heads; ++h) {
            const Index route = h * config.num_routed_q / heads, kv_route = h * config.num_routed_kv / heads;
            const auto of_token = [&](const auto& linear, Index token, Index first) {
                return part(evaluate(linear, evaluate(heavy.norm, row_of(x, b, token))), first, dim_head);
            };
            for (Index i = 0; i < picks; ++i) {
                const Index token = q.indices.const_view()(b, route, i);
                const double score = q.scores.const_view()(b, route, i);
                chosen[static_cast<std::size_t>(token)] = true;
                const Row query = times(rotated(of_token(heavy.to_q, token, h * dim_head), token), score);
                const double* const null = &heavy.null_kv.const_view()(0, h, 0);
                const double* const null_value = &heavy.null_kv.const_view()(1, h, 0);
                std::vector<Row> keys{Row(null, null + dim_head)}, values{Row(null_value, null_value + dim_head)};
                Row biases{0};
                for (Index j = 0; j < kv.indices.extent(2); ++j) {
                    const Index key = kv.indices.const_view()(b, kv_route, j);
                    if (mask && !mask(b, key)) continue;
                    const double key_score = kv.scores.const_view()(b, kv_route, j);
                    keys.push_back(times(rotated(of_token(heavy.to_kv, key, 2 * h * dim_head), key), key_score));
                    values.push_back(times(of_token(heavy.to_kv, key, (2 * h + 1) * dim_head), key_score));
                    biases.push_back(heavy.relative_attention_bias.weight.const_view()(buckets.bucket(key - token), h));
                }
                const Row head = attend_with_bias(query, keys, values, biases);
                for (Index e = 0; e < dim; ++e)
                    for (Index c = 0; c < dim_head; ++c)
                        out.view()(b, token, e) += score * heavy.to_out.weight.const_view()(e, h * dim_head + c) *
                                                   head[static_cast<std::size_t>(c)];
            }
        }
        for (Index i = 0; i < x.extent(1); ++i)
            if (!chosen[static_cast<std::size_t>(i)] && (!mask || mask(b, i)))
                for (Index e = 0; e < dim; ++e) out.view()(b, i, e) += module.null_q_token.data()[e];
    }
    return out;
}

}  // namespace

TEST_CASE_TEMPLATE("query routes: each head by its definition, over the queries of its route", Module,
                   Attention<two_of_four>, Attention<one_a_head>, Attention<more_keys>, Attention<alike>,
                   Attention<one_route>) {
    const Cpu policy(2);
    const auto module = drawn<Module>(policy);
    const auto x = normal<double>(policy, std::array<Index, 3>{3, length, dim}, 0, 0.7);
    const auto some = mask_of_lengths(policy, {length, 7, 2}, length);
    for (const Mask mask : {Mask(), some.const_view()})
        for (const Index num_q : {1, 3, 12, 20}) {
            const AttentionCounts counts{num_q, 5};
            CAPTURE(num_q);
            // Frequencies are rounded to float.
            CHECK(relative_error(module(x, mask, counts), naive(module, x, mask, counts)) <= 2e-7);
        }
}

TEST_CASE_TEMPLATE("query routes: gradients by finite differences" * not_sanitized, Module, Attention<two_of_four>,
                   Attention<one_a_head>, Attention<more_keys>, Attention<without_options>, Attention<by_softmax>,
                   Attention<heavy_alone>, OfUser) {
    const Cpu policy(1);
    auto module = drawn<Module>(policy);
    auto x = normal<double>(policy, std::array<Index, 3>{2, 9, dim}, 0, 0.7);
    const auto mask = mask_of_lengths(policy, {7, 2}, 9);
    check_gradients(module, x, {});
    check_gradients(module, x, mask.const_view());
    check_gradients(module, x, mask.const_view(), AttentionCounts{.num_heavy_tokens_q = 6, .num_heavy_tokens_kv = 2},
                    Residual::tokens);
    auto shorter = resized(policy, x, 3);  // n <= k
    check_gradients(module, shorter, {});
}

TEST_CASE("query routes: in float as in double") {
    const Cpu policy(2);
    const auto of_double = drawn<Attention<one_a_head>>(policy);
    const auto of_float = drawn<Attention<one_a_head, float>>(policy);
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 200, dim}, 0, 0.7),
               d_out = normal<double>(policy, x.shape(), 1);
    const auto x_f = normal<float>(policy, x.shape(), 0, 0.7f), d_out_f = normal<float>(policy, x.shape(), 1);
    const AttentionCounts counts{70, 90};
    auto gradients = of_double.make_gradients();
    auto gradients_f = of_float.make_gradients();
    const auto saved = of_double.forward(x, {}, counts);
    const auto saved_f = of_float.forward(x_f, {}, counts);
    CHECK(relative_error(saved_f.out, saved.out) <= 2e-6);
    CHECK(relative_error(of_float.backward(saved_f, d_out_f, gradients_f),
                         of_double.backward(saved, d_out, gradients)) <= 1e-5);
    CHECK(relative_error(gradients_f.heavy_attn.to_q.weight, gradients.heavy_attn.to_q.weight) <= 1e-5);
    CHECK(relative_error(gradients_f.heavy_attn.to_out.weight, gradients.heavy_attn.to_out.weight) <= 1e-5);
}

TEST_CASE("query routes: gradients through Sinkhorn routing, whose picks repeat, by finite differences" *
          not_sanitized) {
    const Cpu policy(1);
    auto module = drawn<Attention<by_sinkhorn>>(policy);
    auto x = normal<double>(policy, std::array<Index, 3>{2, 9, dim}, 0, 0.7);
    const auto mask = mask_of_lengths(policy, {7, 2}, 9);  // fewer real tokens than slots
    HostTensor<double, 3> q_noise(policy, {4, 3, 9}), kv_noise(policy, {4, 4, 9});
    fill_with(policy, q_noise, [&](std::size_t i) { return Random(Seed{5}).gumbel(i); });
    fill_with(policy, kv_noise, [&](std::size_t i) { return Random(Seed{6}).gumbel(i); });
    module.q_router.noise = GumbelNoise<double>::given(q_noise.const_view());
    module.kv_router.noise = GumbelNoise<double>::given(kv_noise.const_view());
    check_gradients(module, x, {});
    check_gradients(module, x, mask.const_view());
}

/// Two routes that choose the same tokens, with half of the heads each, are one route with all heads. With Sinkhorn
/// routing a token is then chosen several times by each.
TEST_CASE("query routes: routes that choose alike are one route") {
    const Cpu policy(1);
    const auto check = [&]<AttentionConfig one, AttentionConfig two>(const Attention<one>& single,
                                                                     Attention<two>& several) {
        copy_to_two_routes(single, several);
        const auto x = normal<double>(policy, std::array<Index, 3>{2, 9, dim}, 0, 0.7);
        const auto d_out = normal<double>(policy, x.shape(), 1);
        const auto some = mask_of_lengths(policy, {9, 2}, 9);
        for (const Mask mask : {Mask(), some.const_view()})
            without_noise(single, [&] {
                without_noise(several, [&] {
                    auto of_one = single.make_gradients();
                    auto of_two = several.make_gradients();
                    const auto saved = single.forward(x, mask);
                    const auto saved_of_two = several.forward(x, mask);
                    CHECK(relative_error(saved_of_two.out, saved.out) <= 1e-12);
                    CHECK(relative_error(several.backward(saved_of_two, d_out, of_two),
                                         single.backward(saved, d_out, of_one)) <= 1e-10);
                    CHECK(relative_error(of_two.heavy_attn.to_out.weight, of_one.heavy_attn.to_out.weight) <= 1e-11);
                    CHECK(relative_error(of_two.heavy_attn.to_q.weight, of_one.heavy_attn.to_q.weight) <= 1e-11);
                    CHECK(relative_error(of_two.null_q_token, of_one.null_q_token) <= 1e-12);
                    for (Index e = 0; e < dim; ++e)
                        CHECK(of_two.q_router.routing_token.data()[e] + of_two.q_router.routing_token.data()[dim + e] ==
                              doctest::Approx(of_one.q_router.routing_token.data()[e]).epsilon(1e-9));
                });
            });
    };
    auto several = drawn<Attention<two_of_four>>(policy);
    check(drawn<Attention<one_route>>(policy), several);
    auto by_noise = drawn<Attention<full(RouterType::sinkhorn, 4, 2, 1)>>(policy);
    check(drawn<Attention<full(RouterType::sinkhorn, 4, 1, 1)>>(policy), by_noise);
}

TEST_CASE_TEMPLATE("query routes: gradients of cross attention, queries routed or not", Module, Cross, CrossOfUser) {
    const Cpu policy(1);
    auto module = drawn<Module>(policy);
    check_cross_gradients(policy, module, dim);
}

TEST_CASE("query routes: in cross attention, a head's queries are those of its route") {
    const Cpu policy(1);
    const auto module = drawn<Cross>(policy);
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 7, dim}, 0, 0.7);
    const auto context = normal<double>(policy, std::array<Index, 3>{2, 9, dim}, 1, 0.7);
    auto expected = filled<double>(policy, x.shape(), 0);
    const auto q = module.q_router.route(policy, x.const_view(), {}, 3);
    const auto unrouted = unrouted_tokens(policy, all_routes(q.indices), {}, 7);
    add_null_query(policy, expected.view(), module.null_q_token, unrouted.const_view());
    // One route at a time: the other heads' columns of to_out are zeros, and all heads see the queries of this route.
    for (Index r = 0; r < 4; ++r) {
        auto copy = clone(policy, module);
        auto& head = copy.heavy_attn;
        for (Index e = 0; e < dim; ++e)
            for (Index c = 0; c < 12; ++c)
                if (c / 3 != r) head.to_out.weight.view()(e, c) = 0;
        const auto kv = module.kv_router.route(policy, context.const_view(), {}, 4);
        for (Index b = 0; b < 2; ++b) {
            const TokensView<const TokenIndex> indices(&q.indices.const_view()(b, r, 0), {1, 1, 3});
            const auto out = head.forward(policy, gather(policy, sequence(x, b), indices),
                                          gather(policy, sequence(context, b), sequence(kv.indices, b)), {},
                                          sequence(kv.scores, b), {}, {indices, sequence(kv.indices, b)});
            for (Index i = 0; i < 3; ++i)
                for (Index e = 0; e < dim; ++e)
                    expected.view()(b, indices(0, 0, i), e) +=
                        q.scores.const_view()(b, r, i) * out.out.const_view()(0, i, e);
        }
    }
    CHECK(relative_error(module(x, context), expected) <= 1e-12);
}

TEST_CASE("query routes: each route has a routing token, a view and a summary of its own; names stay") {
    const Cpu policy(1);
    const auto module = drawn<Attention<one_a_head>>(policy);
    CHECK(module.q_router.routing_token.shape() == std::array<Index, 2>{4, dim});
    const Attention<one_route> of_one_route(policy);
    std::set<std::string> names, names_of_one;
    Attention<one_a_head>::each_parameter([&](const std::string& name, const auto&) { names.insert(name); }, "",
                                          module);
    Attention<one_route>::each_parameter([&](const std::string& name, const auto&) { names_of_one.insert(name); }, "",
                                         of_one_route);
    CHECK(names == names_of_one);

    const auto x = normal<double>(policy, std::array<Index, 3>{2, length, dim}, 0);
    const auto mask = mask_of_lengths(policy, {length, 2}, length);
    std::set<std::vector<TokenIndex>> choices;
    module.forward(x, mask.const_view()).each_router([&](const std::string& name, const auto& view) {
        if (name != "q_router") return;
        REQUIRE(view.indices.shape() == std::array<Index, 3>{2, 4, 3});
        REQUIRE(view.logits.shape() == std::array<Index, 3>{2, 4, length});
        CHECK(relative_error(view.logits, route_logits(policy, x, module.q_router.routing_token)) == 0);
        const auto [live, thresholds] = summarize(policy, view);
        REQUIRE(thresholds.shape() == std::array<Index, 2>{2, 4});
        for (Index r = 0; r < 4; ++r) {
            CHECK(live.const_view()(0, r) == 3);
            CHECK(live.const_view()(1, r) == 2);
            const auto first = view.indices[0][r];
            choices.insert(std::vector<TokenIndex>(first.data(), first.data() + 3));
            for (Index i = 0; i < 3; ++i) CHECK(view.logits(0, r, first(i)) >= thresholds.const_view()(0, r));
        }
    });
    CHECK(choices.size() > 1);
}

TEST_CASE("query routes: errors name the argument") {
    const Cpu policy(1);
    SeedSequence seeds(Seed{1});
    const HeavyAttention<double, Cpu> heavy(policy, seeds, dim, 4, dim_head);
    const auto x = normal<double>(policy, std::array<Index, 4>{2, 2, 3, dim}, 0),
               by_three = normal<double>(policy, std::array<Index, 4>{2, 3, 3, dim}, 0);
    HostTensor<TokenIndex, 3> positions(policy, {2, 1, 3});
    fill(policy, positions, 0);
    CHECK_THROWS_WITH_AS(heavy.forward(policy, by_three, x, {}, {}),
                         "colt5: `routes of x` must be a divisor of 4 heads, but is 3", ValueError);
    CHECK_THROWS_WITH_AS(heavy.forward(policy, x, x, {}, {}, {}, {positions.const_view(), {}}),
                         "colt5: `positions.queries` must have shape (2, 2, 3), but has (2, 1, 3)", ShapeError);
}
