// SPDX-License-Identifier: MIT
#include <colt5/module/conditional_routed_transformer_block.hpp>

#include <set>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr TransformerBlockConfig config{
    .dim = 5,
    .num_heavy_attn_tokens_q = 3,
    .num_heavy_attn_tokens_kv = 4,
    .num_routed_kv = 2,
    .num_heavy_ff_tokens = 5,
    .light_dim_head = 2,
    .light_heads = 2,
    .light_window_size = 4,
    .heavy_dim_head = 3,
    .heavy_heads = 2,
    .heavy_ff_mult = 1.5,
    .router_straight_through = false,
};
using Block = ConditionalRoutedTransformerBlock<config, double, Cpu>;

}  // namespace

TEST_CASE("ConditionalRoutedTransformerBlock: x = attn(x) + x; x = ff(x) + x") {
    const Cpu policy(2);
    const Block block(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 9, 5}, 0);
    const auto some = mask_of_lengths(policy, {9, 6}, 9);
    for (const Mask mask : {Mask(), some.const_view()}) {
        auto middle = block.conditional_attn(x, mask, {2, 3});
        for (Index i = 0; i < middle.size(); ++i) middle.data()[i] += x.data()[i];
        auto expected = block.conditional_ff(middle, mask, {4});
        for (Index i = 0; i < middle.size(); ++i) expected.data()[i] += middle.data()[i];
        const auto out =
            block(x, mask, {.num_heavy_attn_tokens_q = 2, .num_heavy_attn_tokens_kv = 3, .num_heavy_ff_tokens = 4});
        CHECK(relative_error(out, expected) <= 1e-14);
    }
    CHECK(same_bits(block(x), block(x, {}, {3, 4, 5})));
    CHECK_FALSE(same_bits(block(x), block(x, {}, {.num_heavy_ff_tokens = 4})));
}

TEST_CASE("ConditionalRoutedTransformerBlock: gradients by finite differences" * not_sanitized) {
    const Cpu policy(1);
    Block block(policy, Seed{1});
    auto x = normal<double>(policy, std::array<Index, 3>{2, 9, 5}, 0, 0.7);
    const auto mask = mask_of_lengths(policy, {7, 2}, 9);
    check_gradients(block, x, {});
    check_gradients(block, x, mask.const_view());
    check_gradients(block, x, mask.const_view(), TransformerBlockCounts{6, 2, 1});
    for (const Index length : {1, 3}) {
        auto shorter = resized(policy, x, length);
        const auto shorter_mask = mask_of_lengths(policy, {length, 0}, length);
        check_gradients(block, shorter, shorter_mask.const_view());
    }
}

TEST_CASE(
    "ConditionalRoutedTransformerBlock: activations that are handed to backward give the same bits in less memory") {
    const Cpu policy(2);
    const Block block(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 300, 5}, 0);
    const auto d_out = normal<double>(policy, x.shape(), 1);
    const auto mask = mask_of_lengths(policy, {300, 40}, 300);
    auto kept_gradients = block.make_gradients(), gradients = block.make_gradients();
    const auto peak_of = [&](auto&& backward) {
        policy.workspace()->reset_peak();
        backward();
        return policy.workspace()->statistics().peak;
    };
    TokensTensor<double, Cpu> kept_d_x, d_x;
    auto saved = block.forward(x, mask.const_view());
    const auto peak_kept = peak_of([&] { kept_d_x = block.backward(saved, d_out, kept_gradients); });
    kept_d_x = support::copy_of(policy, kept_d_x);
    const std::size_t in_use = policy.workspace()->statistics().in_use;
    const auto peak = peak_of([&] { d_x = block.backward(std::move(saved), d_out, gradients); });
    CHECK(peak < peak_kept);
    CHECK(policy.workspace()->statistics().in_use < in_use);
    CHECK(same_bits(d_x, kept_d_x));
    Block::each_parameter(
        [](const std::string& name, const auto& a, const auto& b) {
            CAPTURE(name);
            CHECK(same_bits(a, b));
        },
        "", gradients, kept_gradients);
}

TEST_CASE("ConditionalRoutedTransformerBlock: parameters bear the names of the reference's state_dict") {
    const Cpu policy(1);
    const Block block(policy);
    std::set<std::string> names;
    Block::each_parameter([&](const std::string& name, const auto&) { names.insert(name); }, "", block);
    CHECK(names == std::set<std::string>{"conditional_ff.router.routing_token",
                                         "conditional_ff.light_ff.0.gamma",
                                         "conditional_ff.light_ff.1.weight",
                                         "conditional_ff.light_ff.1.bias",
                                         "conditional_ff.light_ff.3.weight",
                                         "conditional_ff.light_ff.3.bias",
                                         "conditional_ff.heavy_ff.0.gamma",
                                         "conditional_ff.heavy_ff.1.weight",
                                         "conditional_ff.heavy_ff.1.bias",
                                         "conditional_ff.heavy_ff.3.weight",
                                         "conditional_ff.heavy_ff.3.bias",
                                         "conditional_attn.light_attn.norm.weight",
                                         "conditional_attn.light_attn.norm.bias",
                                         "conditional_attn.light_attn.to_qkv.weight",
                                         "conditional_attn.light_attn.to_out.weight",
                                         "conditional_attn.q_router.routing_token",
                                         "conditional_attn.kv_router.routing_token",
                                         "conditional_attn.heavy_attn.norm.gamma",
                                         "conditional_attn.heavy_attn.to_q.weight",
                                         "conditional_attn.heavy_attn.to_kv.weight",
                                         "conditional_attn.heavy_attn.to_out.weight"});
}

TEST_CASE("ConditionalRoutedTransformerBlock: the same seed gives the same parameters, and no two streams are alike") {
    const Cpu policy(1);
    const Block a(policy, Seed{3}), b(policy, Seed{3}), other(policy, Seed{4});
    std::set<double> first;
    Index drawn = 0;
    Block::each_parameter(
        [&](const std::string& name, const auto& of_a, const auto& of_b, const auto& of_other) {
            CAPTURE(name);
            CHECK(same_bits(of_a, of_b));
            if (name.ends_with("gamma") || name.find(".norm.") != std::string::npos) return;
            CHECK_FALSE(same_bits(of_a, of_other));
            first.insert(of_a.data()[0]);
            ++drawn;
        },
        "", a, b, other);
    CHECK(static_cast<Index>(first.size()) == drawn);
}

TEST_CASE("ConditionalRoutedTransformerBlock: empty batches and sequences") {
    const Cpu policy(2);
    const Block block(policy);
    for (const auto& shape : {std::array<Index, 3>{0, 4, 5}, {2, 0, 5}}) {
        const auto x = normal<double>(policy, shape, 0);
        const auto saved = block.forward(x);
        CHECK(saved.out.shape() == shape);
        auto gradients = block.make_gradients();
        CHECK(block.backward(saved, x, gradients).shape() == shape);
        Block::each_parameter([](const std::string&, const auto& gradient) { CHECK(all_zero(gradient)); }, "",
                              gradients);
    }
}

TEST_CASE("ConditionalRoutedTransformerBlock: errors name the argument and both shapes or values") {
    const Cpu policy(1);
    const Block block(policy);
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 4, 5}, 0);
    const auto wide = normal<double>(policy, std::array<Index, 3>{2, 4, 6}, 0);
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 3}, 1);
    CHECK_THROWS_WITH_AS(block(wide), "colt5: `tokens` must have shape (any, any, 5), but has (2, 4, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(block.forward(x, mask.const_view()), "colt5: `mask` must have shape (2, 4), but has (2, 3)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(block(x, {}, {.num_heavy_attn_tokens_q = 0}),
                         "colt5: `num_heavy_attn_tokens_q` must be >= 1, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(block(x, {}, {.num_heavy_attn_tokens_kv = 0}),
                         "colt5: `num_heavy_attn_tokens_kv` must be >= 1, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(block(x, {}, {.num_heavy_ff_tokens = 0}),
                         "colt5: `num_heavy_ff_tokens` must be >= 1, but is 0", ValueError);
    const auto saved = block.forward(x);
    auto gradients = block.make_gradients();
    CHECK_THROWS_WITH_AS(block.backward(saved, wide, gradients),
                         "colt5: `d_out` must have shape (any, any, 5), but has (2, 4, 6)", ShapeError);
}
