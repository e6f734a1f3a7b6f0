// SPDX-License-Identifier: MIT
#include "module/checks.hpp"

/// Modules are copied on request: parameters, and the state of what draws noise.

using namespace colt5;
using namespace support;

namespace {

constexpr FeedForwardConfig config{
    .dim = 8, .num_heavy_tokens = 4, .router_straight_through = false, .router_type = RouterType::sinkhorn};
using Module = ConditionalRoutedFeedForward<config, float, Cpu>;

void check_equal(const Module& a, const Module& b) {
    Module::each_parameter(
        [](const std::string& name, const auto& of_a, const auto& of_b) {
            CAPTURE(name);
            CHECK(of_a.data() != of_b.data());
            CHECK(same_bits(of_a, of_b));
        },
        "", a, b);
    each_state<Module>(
        [](const std::string& name, std::uint64_t of_a, std::uint64_t of_b) {
            CAPTURE(name);
            CHECK(of_a == of_b);
        },
        "", a, b);
}

}  // namespace

TEST_CASE("copies: a clone computes and draws what the module does, and goes its own way") {
    const Cpu policy(1);
    const Module module(policy, Seed{1});
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 20, 8}, 0);
    module.forward(x);
    Module copy = clone(policy, module);
    check_equal(copy, module);
    CHECK(same_bits(copy.forward(x).out, module.forward(x).out));
    copy.forward(x);
    CHECK(copy.router.noise.calls == 3);
    CHECK(module.router.noise.calls == 2);

    Module other(policy, Seed{2});
    copy_parameters(policy, other, module);
    check_equal(other, module);
}

TEST_CASE("copies: a moving average of parameters") {
    const Cpu policy(1);
    const Module before(policy, Seed{1}), after(policy, Seed{2});
    Module average = clone(policy, before);
    Module::each_parameter(
        [&](const std::string&, auto& mean, const auto& value) { assign(policy, mean, mean * 0.75f + value * 0.25f); },
        "", average, after);
    Module::each_parameter(
        [&](const std::string& name, const auto& mean, const auto& old, const auto& now) {
            CAPTURE(name);
            for (Index i = 0; i < mean.size(); ++i)
                CHECK(mean.data()[i] == doctest::Approx(0.75 * old.data()[i] + 0.25 * now.data()[i]).epsilon(1e-5));
        },
        "", average, before, after);
}

TEST_CASE("copies: parameters go to another type, and back from what is no module") {
    const Cpu policy(1);
    const ConditionalRoutedFeedForward<config, double, Cpu> module(policy, Seed{1});
    Module rounded(policy, Seed{2});
    copy_parameters(policy, rounded, module);
    CHECK(rounded.light_ff.hidden.weight.data()[5] == static_cast<float>(module.light_ff.hidden.weight.data()[5]));
    CHECK(rounded.router.noise.seed.value == module.router.noise.seed.value);

    auto values = rounded.make_gradients();
    copy_parameters(policy, values, rounded);
    Module again(policy, Seed{3});
    copy_parameters<Module>(policy, again, values);
    CHECK(same_bits(again.heavy_ff.project.weight, rounded.heavy_ff.project.weight));
}

TEST_CASE("copies: what does not fit changes nothing") {
    const Cpu policy(1);
    const Module from(policy, Seed{1});
    Module to(policy, Seed{2});
    to.heavy_ff.project.bias = {policy, {9}};  // the last parameter
    const auto before = to_host(policy, to.router.routing_token);
    CHECK_THROWS_WITH_AS(copy_parameters(policy, to, from),
                         "colt5: `to.heavy_ff.project.bias` must have shape (8), but has (9)", ShapeError);
    CHECK(to_host(policy, to.router.routing_token) == before);
}
