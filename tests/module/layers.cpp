// SPDX-License-Identifier: MIT
#include <colt5/module/layers.hpp>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

TEST_CASE("layers: initial values are those of PyTorch's, each parameter from its own stream") {
    const Cpu policy(1);
    SeedSequence seeds(Seed{1});
    const Linear<double, Cpu> first(policy, seeds, 400, 30, true), second(policy, seeds, 400, 30, false);
    CHECK(first.weight.shape() == std::array<Index, 2>{30, 400});
    CHECK(first.bias.shape() == std::array<Index, 1>{30});
    CHECK_FALSE(second.bias);
    double largest = 0, square = 0;
    for (const double w : to_host(policy, first.weight)) {
        largest = std::max(largest, std::abs(w));
        square += w * w / 12000;
    }
    CHECK(largest <= 0.05);  // 1 / √400
    CHECK(largest >= 0.0499);
    CHECK(square == doctest::Approx(0.05 * 0.05 / 3).epsilon(0.03));  // uniform
    for (const double v : to_host(policy, first.bias)) CHECK(std::abs(v) <= 0.05);
    CHECK_FALSE(same_bits(first.weight, second.weight));

    const RMSNorm<double, Cpu> rms(policy, 3);
    const LayerNorm<double, Cpu> layer(policy, 3);
    CHECK(to_host(policy, rms.gamma) == std::vector<double>(3, 1.0));
    CHECK(to_host(policy, layer.weight) == std::vector<double>(3, 1.0));
    CHECK(to_host(policy, layer.bias) == std::vector<double>(3, 0.0));
}

TEST_CASE("layers: parameters are visited under PyTorch's names, modules and gradients side by side") {
    const Cpu policy(1);
    SeedSequence seeds(Seed{1});
    const Linear<float, Cpu> with_bias(policy, seeds, 4, 3, true), without(policy, seeds, 4, 3, false);
    const auto names = [&](const auto& layer) {
        using Layer = std::remove_cvref_t<decltype(layer)>;
        auto zeros = zeros_like_parameters(policy, layer);
        std::vector<std::string> all;
        Layer::each_parameter(
            [&](const std::string& name, const auto& value, const auto& zero) {
                all.push_back(name);
                CHECK(zero.shape() == value.shape());
                CHECK(all_zero(zero));
            },
            "a.", layer, zeros);
        return all;
    };
    using Names = std::vector<std::string>;
    CHECK(names(with_bias) == Names{"a.weight", "a.bias"});
    CHECK(names(without) == Names{"a.weight"});
    CHECK(names(RMSNorm<float, Cpu>(policy, 4)) == Names{"a.gamma"});
    CHECK(names(LayerNorm<float, Cpu>(policy, 4)) == Names{"a.weight", "a.bias"});
    CHECK(count_parameters(with_bias) == 15);
    CHECK(count_parameters(without) == 12);
}
