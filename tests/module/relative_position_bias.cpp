// SPDX-License-Identifier: MIT
#include <colt5/module/conditional_routed_cross_attention.hpp>
#include <colt5/module/conditional_routed_transformer_block.hpp>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr AttentionConfig of_attention{.dim = 5,
                                       .num_heavy_tokens_q = 3,
                                       .num_heavy_tokens_kv = 4,
                                       .num_routed_kv = 2,
                                       .light_dim_head = 2,
                                       .light_heads = 2,
                                       .light_window_size = 6,
                                       .heavy_dim_head = 3,
                                       .heavy_heads = 2,
                                       .router_straight_through = false,
                                       .use_relative_position_bias = true,
                                       .relative_position_num_buckets = 8,
                                       .relative_position_max_distance = 6};
constexpr TransformerBlockConfig of_block{.dim = 6,
                                          .num_heavy_attn_tokens_q = 4,
                                          .num_heavy_attn_tokens_kv = 5,
                                          .num_routed_kv = 2,
                                          .num_heavy_ff_tokens = 3,
                                          .light_dim_head = 3,
                                          .light_heads = 2,
                                          .light_window_size = 4,
                                          .heavy_dim_head = 2,
                                          .heavy_heads = 2,
                                          .router_straight_through = false,
                                          .use_null_kv = true,
                                          .use_relative_position_bias = true,
                                          .relative_position_num_buckets = 6,
                                          .relative_position_max_distance = 9};
constexpr CrossAttentionConfig of_cross{.dim = 5,
                                        .num_tokens_q = 3,
                                        .num_tokens_kv = 4,
                                        .dim_head = 2,
                                        .heads = 2,
                                        .router_straight_through = false,
                                        .kv_routing_tokens = 2,
                                        .use_null_kv = true,
                                        .use_relative_position_bias = true,
                                        .relative_position_num_buckets = 4,
                                        .relative_position_max_distance = 5};
template <AttentionConfig config, typename Scalar = double>
using Attention = ConditionalRoutedAttention<config, Scalar, Cpu>;
using Block = ConditionalRoutedTransformerBlock<of_block, double, Cpu>;
using Cross = ConditionalRoutedCrossAttention<of_cross, double, Cpu>;

constexpr AttentionConfig without_bias() {
    AttentionConfig config = of_attention;
    config.use_relative_position_bias = false;
    return config;
}

/// Tables of larger numbers than those at the start, so that they count.
template <typename Module>
void draw_tables(Module& module) {
    std::uint64_t stream = 500;
    Module::each_parameter(
        [&](const std::string& name, auto& value) {
            if (name.find("relative_attention_bias") != std::string::npos)
                fill_normal(module.policy(), value, Random(Seed{3}, ++stream));
        },
        "", module);
    REQUIRE(stream > 500);
}

}  // namespace

TEST_CASE("relative position bias: a table (num_buckets, heads) for each branch, normal with deviation 1 / √dim") {
    const Cpu policy(1);
    const Attention<of_attention> small(policy);
    std::vector<std::string> names;
    Attention<of_attention>::each_parameter(
        [&](const std::string& name, const auto& value) {
            if (name.find("bias.weight") == std::string::npos) return;
            names.push_back(name);
            CHECK(value.const_view().size() == 16);
        },
        "", small);
    CHECK(names == std::vector<std::string>{"light_attn.relative_attention_bias.weight",
                                            "heavy_attn.relative_attention_bias.weight"});
    constexpr AttentionConfig wide{.dim = 400,
                                   .num_heavy_tokens_q = 3,
                                   .num_heavy_tokens_kv = 4,
                                   .light_dim_head = 1,
                                   .light_heads = 100,
                                   .heavy_dim_head = 1,
                                   .use_relative_position_bias = true};
    const Attention<wide> module(policy, Seed{1});
    const auto& table = module.light_attn.relative_attention_bias.weight;
    REQUIRE(table.shape() == std::array<Index, 2>{32, 100});
    CHECK(std::sqrt(inner(table, table) / 3200) == doctest::Approx(1.0 / 20).epsilon(0.05));
    CHECK(count_parameters(Attention<without_bias()>(policy)) + 2 * 16 == count_parameters(small));
}

TEST_CASE("relative position bias: the light branch by distance, the heavy branch by the tokens' own positions") {
    const Cpu policy(2);
    Attention<of_attention> module(policy, Seed{1});
    draw_tables(module);
    constexpr Index length = 17;
    const auto x = normal<double>(policy, std::array<Index, 3>{2, length, 5}, 0);
    const auto some = mask_of_lengths(policy, {length, 9}, length);
    const RelativePositionBuckets buckets{8, 6};
    /// One head of one query over keys with logits and values, as `attend` of checks.hpp but with a bias.
    const auto biased = [](const Row& q, const std::vector<Row>& keys, const std::vector<Row>& values,
                           const Row& scales, const Row& bias) {
        // A further entry of q and of the keys whose product is the bias; attend scales by the length of q.
        const double scale = std::sqrt(static_cast<double>(q.size() + 1)),
                     old = std::sqrt(static_cast<double>(q.size()));
        Row query = q;
        for (double& e : query) e *= scale / old;
        query.push_back(scale);
        std::vector<Row> with_bias = keys, wide = values;
        for (std::size_t j = 0; j < keys.size(); ++j) {
            with_bias[j].push_back(bias[j]);
            wide[j].push_back(0);
        }
        Row out = attend(query, with_bias, wide, scales);
        out.pop_back();
        return out;
    };
    for (const Mask mask : {Mask(), some.const_view()}) {
        auto expected = filled<double>(policy, x.shape(), 0);
        const auto& light = module.light_attn;
        const auto& heavy = module.heavy_attn;
        const auto q = module.q_router.route(policy, x.const_view(), mask, 3);
        const auto kv = module.kv_router.route(policy, x.const_view(), mask, 4);
        for (Index b = 0; b < 2; ++b) {
            std::vector<Row> qkv, of_heavy_q, of_heavy_kv;
            for (Index i = 0; i < length; ++i) {
                const Row token = row_of(x, b, i), normed = evaluate(heavy.norm, token);
                qkv.push_back(evaluate(light.to_qkv, evaluate(light.norm, token)));
                of_heavy_q.push_back(evaluate(heavy.to_q, normed));
                of_heavy_kv.push_back(evaluate(heavy.to_kv, normed));
            }
            const auto at = [](Index i) { return static_cast<std::size_t>(i); };
            for (Index i = 0; i < length; ++i) {
                Row merged;
                for (Index h = 0; h < 2; ++h) {
                    std::vector<Row> keys, values;
                    Row bias;
                    for (Index j = std::max(Index{0}, i - 3); j <= std::min(length - 1, i + 3); ++j) {
                        if (mask && !mask(b, j)) continue;
                        keys.push_back(part(qkv[at(j)], 4 + 2 * h, 2));
                        values.push_back(part(qkv[at(j)], 8 + 2 * h, 2));
                        bias.push_back(light.relative_attention_bias.weight.const_view()(buckets.bucket(j - i), h));
                    }
                    const Row head = biased(part(qkv[at(i)], 2 * h, 2), keys, values, Row(keys.size(), 1.0), bias);
                    merged.insert(merged.end(), head.begin(), head.end());
                }
                const Row y = evaluate(light.to_out, merged);
                std::copy(y.begin(), y.end(), &expected.view()(b, i, 0));
            }
            for (Index pick = 0; pick < 3; ++pick) {
                const Index i = q.indices.const_view()(b, 0, pick);
                Row merged;
                for (Index h = 0; h < 2; ++h) {  // one head a route
                    std::vector<Row> keys, values;
                    Row bias, scales;
                    for (Index of = 0; of < 4; ++of) {
                        const Index j = kv.indices.const_view()(b, h, of);
                        if (mask && !mask(b, j)) continue;
                        keys.push_back(part(of_heavy_kv[at(j)], 6 * h, 3));
                        values.push_back(part(of_heavy_kv[at(j)], 6 * h + 3, 3));
                        scales.push_back(kv.scores.const_view()(b, h, of));
                        bias.push_back(heavy.relative_attention_bias.weight.const_view()(buckets.bucket(j - i), h));
                    }
                    const Row head = biased(part(of_heavy_q[at(i)], 3 * h, 3), keys, values, scales, bias);
                    merged.insert(merged.end(), head.begin(), head.end());
                }
                const Row y = evaluate(heavy.to_out, merged);
                for (Index e = 0; e < 5; ++e) expected.view()(b, i, e) += q.scores.const_view()(b, 0, pick) * y[at(e)];
            }
        }
        CHECK(relative_error(module(x, mask), expected) <= 1e-12);
    }
}

TEST_CASE("relative position bias: gradients by finite differences, saved or recomputed, in one chunk or several" *
          not_sanitized) {
    for (const MemoryPlan plan : {MemoryPlan{4096, true}, {4096, false}, {8, true}, {8, false}}) {
        CAPTURE(plan.tokens_at_a_time);
        CAPTURE(plan.recompute);
        const Cpu policy(1, plan);
        Attention<of_attention> module(policy, Seed{1});
        draw_tables(module);
        for (const Index length : {1, 3, 29}) {
            auto x = normal<double>(policy, std::array<Index, 3>{2, length, 5}, 0, 0.7);
            check_gradients(module, x, {});
            const auto mask = mask_of_lengths(policy, {length, length / 2}, length);
            check_gradients(module, x, mask.const_view());
        }
        Block block(policy, Seed{1});
        draw_tables(block);
        auto x = normal<double>(policy, std::array<Index, 3>{2, 17, 6}, 0, 0.7);
        const auto mask = mask_of_lengths(policy, {17, 7}, 17);
        check_gradients(block, x, mask.const_view());
    }
}

TEST_CASE("relative position bias: cross attention by finite differences, routed or not") {
    const Cpu policy(1);
    Cross module(policy, Seed{1});
    draw_tables(module);
    for (const Index queries : {2, 9})
        for (const Index keys : {3, 8}) {
            CAPTURE(queries);
            CAPTURE(keys);
            auto x = normal<double>(policy, std::array<Index, 3>{2, queries, 5}, 0);
            auto context = normal<double>(policy, std::array<Index, 3>{2, keys, 5}, 1);
            const auto context_mask = mask_of_lengths(policy, {keys, 2}, keys);
            const auto d_out = normal<double>(policy, x.shape(), 2);
            auto gradients = module.make_gradients();
            const auto saved = module.forward(x, context, {}, context_mask.const_view());
            const auto d = module.backward(saved, d_out, gradients);
            const auto loss = [&] { return inner(d_out, module(x, context, {}, context_mask.const_view())); };
            CHECK(gradient_error(d.d_x, finite_differences(policy, x, loss)) <= gradient_tolerance);
            CHECK(gradient_error(d.d_context, finite_differences(policy, context, loss)) <= gradient_tolerance);
            check_parameter_gradients(policy, module, gradients, loss);
            CHECK(gradient_norm<Cross>(gradients, "heavy_attn.relative_attention_bias.weight") > 1e-4);
        }
}

TEST_CASE("relative position bias: batched = alone, padding changes nothing, the same bits on each run") {
    const Cpu policy(2);
    Attention<of_attention> module(policy, Seed{1});
    draw_tables(module);
    const auto x = normal<double>(policy, std::array<Index, 3>{3, 40, 5}, 0);
    const auto mask = mask_of_lengths(policy, {40, 21, 9}, 40);
    const auto d_out = normal<double>(policy, x.shape(), 1);
    const auto run = [&](const auto& tokens, Mask given, const auto& d) {
        auto gradients = module.make_gradients();
        const auto saved = module.forward(tokens, given);
        auto d_x = module.backward(saved, d, gradients);
        return std::pair(copy_of(policy, saved.out), std::pair(std::move(d_x), std::move(gradients)));
    };
    const auto all = run(x, mask.const_view(), d_out);
    const auto again = run(x, mask.const_view(), d_out);
    CHECK(same_bits(again.first, all.first));
    CHECK(same_bits(again.second.first, all.second.first));
    Attention<of_attention>::each_parameter(
        [](const std::string& name, const auto& a, const auto& b) {
            CAPTURE(name);
            CHECK(same_bits(a, b));
        },
        "", again.second.second, all.second.second);
    for (Index b = 0; b < 3; ++b) {
        const auto alone = copy_of(policy, sequence(x, b));
        const auto of_alone = run(alone, Mask(mask.const_view()[b].data(), {1, 40}), sequence(d_out, b));
        CHECK(same_bits(of_alone.first, sequence(all.first, b)));
        CHECK(same_bits(of_alone.second.first, sequence(all.second.first, b)));
    }
    // Other numbers in the padding, and more of it.
    auto longer = resized(policy, x, 55);
    const auto longer_mask = mask_of_lengths(policy, {40, 21, 9}, 55);
    const auto padded = module(longer, longer_mask.const_view());
    for (Index b = 0; b < 3; ++b)
        for (Index i = 0; i < (b == 0 ? 40 : b == 1 ? 21 : 9) * 5; ++i)
            CHECK(padded.const_view()[b].data()[i] == all.first.const_view()[b].data()[i]);
}

TEST_CASE("relative position bias: tables of zeros give what no bias gives, bit for bit") {
    const Cpu policy(1);
    Attention<of_attention> with(policy, Seed{1});
    Attention<without_bias()> without(policy, Seed{1});
    Attention<without_bias()>::each_parameter(
        [&](const std::string& name, const auto& value) {
            Attention<of_attention>::each_parameter(
                [&](const std::string& other, auto& to) {
                    if (other == name) std::copy_n(value.data(), value.size(), to.data());
                    if (other.find("bias.weight") != std::string::npos) set_zero(policy, to);
                },
                "", with);
        },
        "", without);
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 31, 5}, 0);
    CHECK(same_bits(with(x), without(x)));
}

TEST_CASE("relative position bias: a table of another shape is named") {
    const Cpu policy(1);
    Attention<of_attention> module(policy, Seed{1});
    module.heavy_attn.relative_attention_bias.weight = filled<double>(policy, std::array<Index, 2>{8, 3}, 0);
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 4, 5}, 0);
    CHECK_THROWS_WITH_AS(module(x),
                         "colt5: `heavy_attn.relative_attention_bias.weight` must have shape (8, 2), but has (8, 3)",
                         ShapeError);
}
