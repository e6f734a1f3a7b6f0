// SPDX-License-Identifier: MIT
/// Rotary embeddings in modules. What the package computes in the heavy branch is in tests/golden.
#include <set>
#include <string>

#include "module/invariances.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr AttentionConfig with(RouterType type, bool heavy, bool light, Index num_routed_kv) {
    return {.dim = 5,
            .num_heavy_tokens_q = 3,
            .num_heavy_tokens_kv = 4,
            .num_routed_kv = num_routed_kv,
            .light_dim_head = 6,
            .light_heads = 2,
            .light_window_size = 4,
            .heavy_dim_head = 4,
            .heavy_heads = 2,
            .router_straight_through = false,
            .router_type = type,
            .rotary_emb = heavy,
            .light_rotary_emb = light};
}
constexpr AttentionConfig both = with(RouterType::coor_descent, true, true, 2);
constexpr AttentionConfig light_only = with(RouterType::coor_descent, false, true, 1);
constexpr AttentionConfig heavy_alone = [] {
    AttentionConfig config = with(RouterType::cum_softmax, true, false, 1);
    config.has_light_attn = false;
    return config;
}();
constexpr AttentionConfig with_all_options = [] {
    AttentionConfig config = with(RouterType::coor_descent, true, true, 2);
    config.use_null_kv = config.use_null_q_tokens = true;
    config.multiply_keys_by_score = config.multiply_queries_by_score = config.use_relative_position_bias = true;
    return config;
}();
constexpr AttentionConfig neither = with(RouterType::coor_descent, false, false, 2);
template <AttentionConfig config, typename Scalar = double>
using Attention = ConditionalRoutedAttention<config, Scalar, Cpu>;

constexpr TransformerBlockConfig block_config(RouterType type) {
    TransformerBlockConfig config = invariance_config(type);
    config.heavy_dim_head = 8;
    config.rotary_emb = config.light_rotary_emb = config.use_null_kv = true;
    return config;
}
constexpr TransformerBlockConfig by_descent = block_config(RouterType::coor_descent),
                                 by_sinkhorn = block_config(RouterType::sinkhorn);
template <typename T>
using Block = ConditionalRoutedTransformerBlock<by_descent, T, Cpu>;
using SinkhornBlock = ConditionalRoutedTransformerBlock<by_sinkhorn, float, Cpu>;

/// A head at a position.
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

constexpr Index dim = 5, heads = 2, dim_head = 4;
using Light = LightAttention<double, Cpu>;

TokensTensor<double, Cpu> naive(const Cpu& policy, const Light& light, const TokensTensor<double, Cpu>& x, Mask mask) {
    constexpr Index inner_width = heads * dim_head;
    auto out = tensor_like(policy, x);
    for (Index b = 0; b < x.extent(0); ++b)
        for (Index i = 0; i < x.extent(1); ++i) {
            const Row of_i = evaluate(light.to_qkv, evaluate(light.norm, row_of(x, b, i)));
            Row merged;
            for (Index h = 0; h < heads; ++h) {
                std::vector<Row> keys, values;
                for (Index j = 0; j < x.extent(1); ++j) {
                    if (std::abs(i - j) > light.schedule.attention.reach || (mask && !mask(b, j))) continue;
                    const Row of_j = evaluate(light.to_qkv, evaluate(light.norm, row_of(x, b, j)));
                    keys.push_back(rotated(part(of_j, inner_width + h * dim_head, dim_head), j));
                    values.push_back(part(of_j, 2 * inner_width + h * dim_head, dim_head));
                }
                const Row head =
                    attend(rotated(part(of_i, h * dim_head, dim_head), i), keys, values, Row(keys.size(), 1.0));
                merged.insert(merged.end(), head.begin(), head.end());
            }
            const Row y = evaluate(light.to_out, merged);
            std::copy(y.begin(), y.end(), out.view()[b][i].data());
        }
    return out;
}
Light light_attention(const Cpu& policy, LocalAttention attention) {
    SeedSequence seeds(Seed{1});
    return Light(policy, seeds, dim, heads, dim_head, attention, {}, true);
}

template <typename Module>
std::set<std::string> buffers_of(const Module& module) {
    std::set<std::string> names;
    const auto pass_over = [](const std::string&, const auto&...) {};
    Module::each_parameter(
        StateVisitor{pass_over, pass_over, [&](const std::string& name, const auto&) { names.insert(name); }}, "",
        module);
    return names;
}

}  // namespace

TEST_CASE("rotary: light attention is a loop over the window of rotated heads, however it is cut into chunks") {
    for (const MaskedRows masked_rows : {MaskedRows::zero, MaskedRows::window_mean})
        for (const Index length : {1, 9, 30}) {
            CAPTURE(length);
            const Cpu whole(2);
            const Light light = light_attention(whole, {2, masked_rows});
            auto x = normal<double>(whole, std::array<Index, 3>{2, length, dim}, 0);
            const auto d_out = normal<double>(whole, x.shape(), 2);
            const auto some = random_mask(whole, std::array<Index, 2>{2, length}, 1, 0.8);
            for (const Mask mask : {Mask(), some.const_view()}) {
                const auto expected = light(whole, x, mask);
                if (masked_rows == MaskedRows::zero)  // frequencies are rounded to float
                    CHECK(relative_error(expected, naive(whole, light, x, mask)) <= 1e-6);
                const auto loss = [&] { return inner(d_out, light(whole, x, mask)); };
                const auto d_expected = finite_differences(whole, x, loss);
                for (const MemoryPlan plan : {MemoryPlan{4096, true}, {4096, false}, {1, true}, {1, false}}) {
                    CAPTURE(plan.tokens_at_a_time);
                    CAPTURE(plan.recompute);
                    const Cpu policy(2, plan);
                    Light parts = light_attention(policy, {2, masked_rows});
                    auto out = tensor_like(policy, x), d_x = tensor_like(policy, x);
                    const auto saved = parts.forward(policy, out.view(), x, mask, !plan.recompute);
                    CHECK(relative_error(out, expected) <= 1e-13);
                    auto gradients = zeros_like_parameters(policy, parts);
                    parts.backward(policy, saved, d_x.view(), d_out, x, mask, gradients);
                    CHECK(gradient_error(d_x, d_expected) <= gradient_tolerance);
                    check_parameter_gradients(policy, parts, gradients,
                                              [&] { return inner(d_out, parts(policy, x, mask)); });
                }
            }
        }
}

TEST_CASE_TEMPLATE("rotary: gradients of attention by finite differences" * not_sanitized, Module, Attention<both>,
                   Attention<light_only>, Attention<heavy_alone>, Attention<with_all_options>) {
    const Cpu policy(1);
    Module module(policy, Seed{1});
    auto x = normal<double>(policy, std::array<Index, 3>{2, 9, 5}, 0, 0.7);
    const auto mask = mask_of_lengths(policy, {7, 2}, 9);
    check_gradients(module, x, {});
    check_gradients(module, x, mask.const_view());
    check_gradients(module, x, mask.const_view(), AttentionCounts{.num_heavy_tokens_q = 6, .num_heavy_tokens_kv = 2});
    auto shorter = resized(policy, x, 3);  // n <= k
    check_gradients(module, shorter, {});
}

TEST_CASE("rotary: it is the distances that count, however many masked tokens come before") {
    const Cpu policy(2);
    const Attention<both> module(policy, Seed{1});
    const Attention<neither> without(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 40, 5}, 0);
    const auto out = module(x);
    CHECK(relative_error(out, without(x)) > 1e-2);
    for (const Index padding : {1, 7, 5000}) {
        CAPTURE(padding);
        auto later = normal<double>(policy, std::array<Index, 3>{2, padding + 40, 5}, 1);
        HostTensor<bool, 2> mask(policy, {2, padding + 40});
        fill_with(policy, mask, [&](std::size_t i) { return static_cast<Index>(i) % (padding + 40) >= padding; });
        for (Index b = 0; b < 2; ++b) std::copy_n(x.const_view()[b].data(), 40 * 5, later.view()[b][padding].data());
        const auto out_later = module(later, mask.const_view());
        double error = 0;
        for (Index b = 0; b < 2; ++b)
            for (Index i = 0; i < 40 * 5; ++i)
                error = std::fmax(
                    error, std::abs(out_later.const_view()[b][padding].data()[i] - out.const_view()[b].data()[i]));
        CHECK(error <= 1e-11);
    }
}

TEST_CASE("rotary: frequencies are no parameters, but buffers under the names of the reference") {
    const Cpu policy(1);
    const Attention<both> module(policy, Seed{1});
    CHECK(count_parameters(module) == count_parameters(Attention<neither>(policy)));
    CHECK(buffers_of(module) == std::set<std::string>{"rotary_emb.inv_freq", "light_attn.attn_fn.rel_pos.inv_freq"});
    CHECK(buffers_of(Attention<heavy_alone>(policy)) == std::set<std::string>{"rotary_emb.inv_freq"});
    CHECK(buffers_of(Attention<light_only>(policy)) == std::set<std::string>{"light_attn.attn_fn.rel_pos.inv_freq"});
    CHECK(buffers_of(Attention<neither>(policy)).empty());
    CHECK(buffers_of(Block<float>(policy)).contains("conditional_attn.rotary_emb.inv_freq"));
    CHECK(to_host(policy, module.heavy_attn.inv_freq) == std::vector<float>{1, 0.01f});

    Attention<both> other(policy, Seed{1});
    fill(policy, other.heavy_attn.inv_freq, 0.5);
    fill(policy, other.light_attn.inv_freq, 0.25);
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 9, 5}, 0);
    CHECK(!same_bits(other(x), module(x)));
    CHECK(same_bits(clone(policy, other)(x), other(x)));
}

TEST_CASE_TEMPLATE("invariances, rotary: batched equals one at a time, bit for bit", B, Block<float>, Block<double>,
                   SinkhornBlock) {
    check_batched_equals_alone<B>();
}
TEST_CASE_TEMPLATE("invariances, rotary: padding never changes a real token", B, Block<float>, Block<double>,
                   SinkhornBlock) {
    check_padding_is_not_seen<B>();
}
TEST_CASE_TEMPLATE("invariances, rotary: padding may hold anything", B, Block<float>, Block<double>, SinkhornBlock) {
    check_padding_may_hold_anything<B>();
}
TEST_CASE_TEMPLATE("invariances, rotary: the same bits from run to run and with any number of threads", B, Block<float>,
                   Block<double>, SinkhornBlock) {
    check_threads_change_nothing<B>();
}
