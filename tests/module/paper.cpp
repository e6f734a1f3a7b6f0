// SPDX-License-Identifier: MIT
#include <colt5/module/paper.hpp>

#include <map>
#include <optional>

#include "module/invariances.hpp"

using namespace colt5;
using namespace support;

namespace {

template <TransformerBlockConfig block, typename Scalar>
using Block = ConditionalRoutedTransformerBlock<block, Scalar, Cpu>;

/// The paper's form with small numbers.
constexpr TransformerBlockConfig small_form(Index dim) {
    TransformerBlockConfig block = config::for_length(config::colt5_base, 64);
    block.dim = dim;
    block.light_dim_head = 3;
    block.light_heads = 2;
    block.light_window_size = 6;
    block.heavy_dim_head = 4;
    block.heavy_heads = 2;
    block.relative_position_num_buckets = 8;
    block.relative_position_max_distance = 6;
    return block;
}
constexpr TransformerBlockConfig smallest = small_form(4), of_invariances = small_form(12);

template <typename Module>
auto shapes_of(const Module& module) {
    std::map<std::string, std::vector<Index>> shapes;
    Module::each_parameter(
        [&](const std::string& name, const auto& parameter) {
            const auto shape = parameter.shape();
            shapes[name] = {shape.begin(), shape.end()};
        },
        "", module);
    return shapes;
}

template <TransformerBlockConfig block>
void check_shapes(const Cpu& policy, Index d, Index light, Index heavy) {
    const auto shapes = shapes_of(Block<block, float>(policy));
    const std::string ff = "conditional_ff.", attn = "conditional_attn.";
    CHECK(shapes ==
          std::map<std::string, std::vector<Index>>{{ff + "router.routing_token", {1, d}},
                                                    {ff + "light_ff.norm.gamma", {d}},
                                                    {ff + "light_ff.wi_0.weight", {d / 2, d}},
                                                    {ff + "light_ff.wi_1.weight", {d / 2, d}},
                                                    {ff + "light_ff.wo.weight", {d, d / 2}},
                                                    {ff + "heavy_ff.norm.gamma", {d}},
                                                    {ff + "heavy_ff.wi_0.weight", {4 * d, d}},
                                                    {ff + "heavy_ff.wi_1.weight", {4 * d, d}},
                                                    {ff + "heavy_ff.wo.weight", {d, 4 * d}},
                                                    {attn + "light_attn.norm.weight", {d}},
                                                    {attn + "light_attn.norm.bias", {d}},
                                                    {attn + "light_attn.to_qkv.weight", {3 * 64 * light, d}},
                                                    {attn + "light_attn.to_out.weight", {d, 64 * light}},
                                                    {attn + "light_attn.relative_attention_bias.weight", {32, light}},
                                                    {attn + "q_router.routing_token", {1, d}},
                                                    {attn + "kv_router.routing_token", {1, d}},
                                                    {attn + "heavy_attn.norm.gamma", {d}},
                                                    {attn + "heavy_attn.to_q.weight", {64 * heavy, d}},
                                                    {attn + "heavy_attn.to_kv.weight", {2 * 64 * heavy, d}},
                                                    {attn + "heavy_attn.to_out.weight", {d, 64 * heavy}},
                                                    {attn + "heavy_attn.relative_attention_bias.weight", {32, heavy}}});
}

}  // namespace

TEST_CASE("the paper's form: parameters of base, large and XL") {
    const Cpu policy(2);
    check_shapes<config::colt5_base>(policy, 768, 4, 8);
    check_shapes<config::colt5_large>(policy, 1024, 4, 12);
    check_shapes<config::colt5_xl>(policy, 2048, 8, 24);
    const auto light = Block<config::colt5_base, float>(policy).conditional_attn.light_attn;
    CHECK(light.schedule.attention.reach == 127);
}

TEST_CASE("the paper's form: numbers of tokens follow the length") {
    const auto counts = [](const TransformerBlockCounts& tokens) {
        return std::array{tokens.num_heavy_attn_tokens_q.value(), tokens.num_heavy_attn_tokens_kv.value(),
                          tokens.num_heavy_ff_tokens.value()};
    };
    CHECK(counts(config::colt5_tokens(16384)) == std::array<Index, 3>{1024, 2048, 1024});
    CHECK(counts(config::colt5_tokens(100)) == std::array<Index, 3>{6, 12, 6});
    CHECK(counts(config::colt5_tokens(1)) == std::array<Index, 3>{1, 1, 1});
    CHECK(config::colt5_base.num_heavy_attn_tokens_q == 1024);
    CHECK(config::colt5_xl.num_heavy_attn_tokens_kv == 2048);
    CHECK(config::for_length(config::colt5_large, 4096).num_heavy_ff_tokens == 256);

    const Cpu policy(1);
    const Block<smallest, double> of_64(policy, Seed{1});
    const Block<config::for_length(smallest, 200), double> of_200(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 200, 4}, 0);
    const auto saved = of_64.forward(x, {}, config::colt5_tokens(200));
    CHECK(same_bits(saved.out, of_200(x)));
    CHECK(!same_bits(saved.out, of_64(x)));
    std::map<std::string, Index> routed;
    saved.each_routing([&](const std::string& name, const auto& routing) { routed[name] = routing.indices.extent(2); });
    CHECK(routed == std::map<std::string, Index>{{"conditional_ff.router", 12},
                                                 {"conditional_attn.q_router", 12},
                                                 {"conditional_attn.kv_router", 25}});
}

TEST_CASE("the paper's form: the base block, forward and backward") {
    const Cpu policy(2);
    const Block<config::colt5_base, float> block(policy, Seed{1});
    const Index length = 300;
    const auto x = normal<float>(policy, std::array<Index, 3>{1, length, 768}, 0),
               d_out = normal<float>(policy, x.shape(), 1);
    const auto counts = config::colt5_tokens(length);
    const auto saved = block.forward(x, {}, counts);
    CHECK(same_bits(saved.out, block(x, {}, counts)));
    CHECK(all_finite(saved.out));
    auto gradients = block.make_gradients();
    CHECK(all_finite(block.backward(saved, d_out, gradients)));
    decltype(block)::each_parameter(
        [&](const std::string& name, const auto& gradient) {
            CAPTURE(name);
            CHECK(all_finite(gradient));
            // With logits of deviation √dim the descent has not converged and its scores saturate.
            if (!name.ends_with("routing_token")) CHECK(!all_zero(gradient));
        },
        "", gradients);
}

TEST_CASE("the paper's form: gradients by finite differences" * not_sanitized) {
    const Cpu policy(1);
    Block<smallest, double> block(policy, Seed{1});
    auto x = normal<double>(policy, std::array<Index, 3>{2, 15, 4}, 0, 0.5);
    const auto mask = mask_of_lengths(policy, {13, 3}, 15);
    check_gradients(block, x, {});
    check_gradients(block, x, mask.const_view());
    check_gradients(block, x, mask.const_view(), TransformerBlockCounts{2, 3, 20});
}

TEST_CASE("the paper's form: scores multiply the normed inputs of keys and values") {
    const Cpu policy(1);
    constexpr Index dim = 5, heads = 4, dim_head = 3, keys = 6;
    for (const Index routes : {1, 2}) {
        CAPTURE(routes);
        SeedSequence seeds(Seed{1});
        HeavyAttention<double, Cpu> heavy(policy, seeds, dim, heads, dim_head, false, true);
        HeavyAttention<double, Cpu> values_only(policy, seeds, dim, heads, dim_head, false, false);
        copy_parameters(policy, values_only, heavy);
        const auto x = normal<double>(policy, std::array<Index, 3>{2, 4, dim}, 0);
        const auto context = normal<double>(policy, std::array<Index, 4>{2, routes, keys, dim}, 1);
        const auto scores = normal<double>(policy, std::array<Index, 3>{2, routes, keys}, 2);
        auto expected = tensor_like(policy, x);
        for (Index b = 0; b < 2; ++b)
            for (Index i = 0; i < 4; ++i) {
                const Row q = evaluate(heavy.to_q, evaluate(heavy.norm, row_of(x, b, i)));
                Row merged;
                for (Index h = 0; h < heads; ++h) {
                    const Index r = h / (heads / routes);
                    std::vector<Row> of_keys, of_values;
                    for (Index j = 0; j < keys; ++j) {
                        const double* const token = context.const_view()[b][r][j].data();
                        Row input = evaluate(heavy.norm, Row(token, token + dim));
                        for (double& number : input) number *= scores.const_view()(b, r, j);
                        const Row kv = evaluate(heavy.to_kv, input);
                        of_keys.push_back(part(kv, h * 2 * dim_head, dim_head));
                        of_values.push_back(part(kv, h * 2 * dim_head + dim_head, dim_head));
                    }
                    const Row head = attend(part(q, h * dim_head, dim_head), of_keys, of_values, Row(keys, 1.0));
                    merged.insert(merged.end(), head.begin(), head.end());
                }
                const Row y = evaluate(heavy.to_out, merged);
                std::copy(y.begin(), y.end(), expected.view()[b][i].data());
            }
        CHECK(relative_error(heavy.forward(policy, x, context, {}, scores.const_view()).out, expected) <= 1e-12);
        CHECK(relative_error(values_only.forward(policy, x, context, {}, scores.const_view()).out, expected) >= 1e-3);
    }
}

TEST_CASE_TEMPLATE("the paper's form: batched equals one at a time, padding and threads change nothing", T, float,
                   double) {
    check_batched_equals_alone<Block<of_invariances, T>>();
    check_padding_is_not_seen<Block<of_invariances, T>>();
    check_padding_may_hold_anything<Block<of_invariances, T>>();
    check_threads_change_nothing<Block<of_invariances, T>>();
}
