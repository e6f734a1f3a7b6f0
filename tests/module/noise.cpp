// SPDX-License-Identifier: MIT
#include "module/checks.hpp"

/// What holds of every module whose routers draw noise.

using namespace colt5;
using namespace support;

namespace {

constexpr TransformerBlockConfig config{.dim = 8,
                                        .num_heavy_attn_tokens_q = 5,
                                        .num_heavy_attn_tokens_kv = 6,
                                        .num_routed_kv = 2,
                                        .num_heavy_ff_tokens = 5,
                                        .light_dim_head = 4,
                                        .light_heads = 2,
                                        .light_window_size = 4,
                                        .heavy_dim_head = 4,
                                        .heavy_heads = 2,
                                        .router_straight_through = false,
                                        .router_type = RouterType::sinkhorn};
using Block = ConditionalRoutedTransformerBlock<config, float, Cpu>;
using Attention = Block::Attention;
using Feed = Block::FeedForward;
constexpr CrossAttentionConfig cross_config{.dim = 8,
                                            .num_tokens_q = 5,
                                            .num_tokens_kv = 6,
                                            .dim_head = 4,
                                            .heads = 2,
                                            .router_straight_through = false,
                                            .router_type = RouterType::sinkhorn,
                                            .kv_routing_tokens = 2};
using Cross = ConditionalRoutedCrossAttention<cross_config, float, Cpu>;

template <typename Module>
auto evaluate(const Module& module, const HostTensor<float, 3>& x) {
    if constexpr (std::same_as<Module, Cross>)
        return module(x, x);
    else
        return module(x);
}
template <typename Module>
auto train(const Module& module, const HostTensor<float, 3>& x) {
    if constexpr (std::same_as<Module, Cross>)
        return module.forward(x, x).out;
    else
        return module.forward(x).out;
}
template <typename Module>
std::vector<std::uint64_t> state(const Module& module) {
    std::vector<std::uint64_t> numbers;
    each_state<Module>([&](const std::string&, std::uint64_t number) { numbers.push_back(number); }, "", module);
    return numbers;
}

/// A visitor of parameters, which makes routers draw the noise of evaluation.
struct Evaluate {
    template <typename... T>
    void operator()(const std::string&, const T&...) const {}
    template <typename Noise>
    void noise(const std::string&, Noise& noise) const {
        noise.evaluates = true;
    }
};

}  // namespace

TEST_CASE_TEMPLATE("noise: a call of a module changes nothing, is the same again, and for each sequence alone", Module,
                   Block, Attention, Feed, Cross) {
    const Cpu policy(1);
    const Module module(policy, Seed{1});
    const auto x = normal<float>(policy, std::array<Index, 3>{3, 30, 8}, 0);
    const auto before = state(module);
    REQUIRE_FALSE(before.empty());
    const auto out = evaluate(module, x);
    CHECK(state(module) == before);
    CHECK(same_bits(evaluate(module, x), out));
    for (Index b = 0; b < 3; ++b)
        CHECK(same_bits(evaluate(module, support::copy_of(policy, sequence(x, b))), sequence(out, b)));

    const auto trained = train(module, x);
    CHECK(state(module) != before);
    CHECK_FALSE(same_bits(trained, out));
    CHECK_FALSE(same_bits(train(module, x), trained));
    CHECK(same_bits(evaluate(module, x), out));
}

TEST_CASE_TEMPLATE("noise: one call switches it off in all routers, until it returns", Module, Block, Attention, Feed,
                   Cross) {
    const Cpu policy(1);
    const Module module(policy, Seed{1});
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 30, 8}, 0);
    const auto out = evaluate(module, x);
    const auto quiet = without_noise(module, [&] { return evaluate(module, x); });
    without_noise(module, [&] { CHECK(same_bits(train(module, x), quiet)); });
    CHECK_FALSE(same_bits(quiet, out));
    CHECK(same_bits(evaluate(module, x), out));
}

TEST_CASE_TEMPLATE("noise: with that of evaluation, forward computes what a call does", Module, Block, Attention, Feed,
                   Cross) {
    const Cpu policy(1);
    const Module module(policy, Seed{1});
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 20, 8}, 0);
    CHECK_FALSE(same_bits(train(module, x), evaluate(module, x)));
    Module::each_parameter(Evaluate{}, "", module);
    CHECK(same_bits(train(module, x), evaluate(module, x)));
    CHECK(same_bits(train(module, x), evaluate(module, x)));
}
