// SPDX-License-Identifier: MIT
#include <colt5/module/gated_feed_forward.hpp>

#include <numbers>

#include "module/invariances.hpp"

using namespace colt5;
using namespace support;

namespace {

/// gelu(x wi_0ᵀ) ∘ (x wi_1ᵀ), by one token; GELU as T5's code writes it.
Row evaluate_gated(const GatedFeedForward<double, Cpu>& ff, const Row& x) {
    const Row normed = evaluate(ff.norm, x);
    Row h = evaluate(ff.wi_0, normed);
    const Row gated = evaluate(ff.wi_1, normed);
    for (std::size_t i = 0; i < h.size(); ++i)
        h[i] *=
            0.5 * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (h[i] + 0.044715 * h[i] * h[i] * h[i]))) * gated[i];
    return evaluate(ff.wo, h);
}

constexpr FeedForwardConfig routed{.dim = 5,
                                   .num_heavy_tokens = 3,
                                   .feed_forward = FeedForwardType::gated,
                                   .light_ff_mult = 0.6,
                                   .heavy_ff_mult = 1.4,
                                   .router_straight_through = false};
using GatedModule = ConditionalRoutedFeedForward<routed, double, Cpu>;

constexpr TransformerBlockConfig block_of(RouterType type) {
    TransformerBlockConfig config = invariance_config(type);
    config.feed_forward = FeedForwardType::gated;
    return config;
}
constexpr TransformerBlockConfig by_descent = block_of(RouterType::coor_descent);
template <typename Scalar>
using Block = ConditionalRoutedTransformerBlock<by_descent, Scalar, Cpu>;

}  // namespace

TEST_CASE("GatedFeedForward: agrees with a loop; inference as training; gradients by finite differences") {
    for (const MemoryPlan plan :
         {MemoryPlan{4096, true}, {4096, false}, {20, true}, {5, true}, {5, false}, {1, true}}) {
        CAPTURE(plan.tokens_at_a_time);
        const Cpu policy(2, plan);
        SeedSequence seeds(Seed{1});
        GatedFeedForward<double, Cpu> ff(policy, seeds, 5, 7);
        fill_normal(policy, ff.norm.gamma, seeds.next());
        auto x = normal<double>(policy, std::array<Index, 3>{3, 9, 5}, 0);
        auto out = tensor_like(policy, x);
        const auto saved = ff.forward(policy, out.view(), x, !plan.recompute);
        CHECK(static_cast<bool>(saved.gate) == !plan.recompute);
        CHECK(same_bits(ff(policy, x), out));
        auto expected = tensor_like(policy, x);
        for (Index b = 0; b < 3; ++b)
            for (Index i = 0; i < 9; ++i) {
                const Row y = evaluate_gated(ff, row_of(x, b, i));
                std::copy(y.begin(), y.end(), expected.view()[b][i].data());
            }
        CHECK(relative_error(out, expected) <= 1e-12);

        const auto d_out = normal<double>(policy, x.shape(), 1);
        auto gradients = zeros_like_parameters(policy, ff);
        auto d_x = tensor_like(policy, x);
        ff.backward(policy, saved, d_x.view(), d_out, x, gradients);
        const auto loss = [&] { return inner(d_out, ff(policy, x)); };
        CHECK(gradient_error(d_x, finite_differences(policy, x, loss)) <= gradient_tolerance);
        check_parameter_gradients(policy, ff, gradients, loss);

        const auto residual = normal<double>(policy, x.shape(), 2);
        auto with_residual = tensor_like(policy, x), d_with_residual = tensor_like(policy, x);
        ff.forward(policy, with_residual.view(), x, false, residual);
        ff.backward(policy, saved, d_with_residual.view(), d_out, x, gradients,
                    GradientEpilogue<double, Cpu>{residual.const_view()});
        auto want = tensor_like(policy, x);
        assign(policy, want, out + residual);
        CHECK(relative_error(with_residual, want) <= 1e-12);
        assign(policy, want, d_x + residual);
        CHECK(relative_error(d_with_residual, want) <= 1e-12);
    }
}

TEST_CASE("GatedFeedForward: in float as in double") {
    const Cpu policy(2);
    SeedSequence seeds(Seed{1}), same_seeds(Seed{1});
    const GatedFeedForward<double, Cpu> ff(policy, seeds, 40, 90);
    const GatedFeedForward<float, Cpu> in_float(policy, same_seeds, 40, 90);
    const std::array<Index, 3> shape{2, 70, 40};
    const auto x = normal<double>(policy, shape, 0), d_out = normal<double>(policy, shape, 1);
    const auto x_in_float = normal<float>(policy, shape, 0), d_in_float = normal<float>(policy, shape, 1);
    const auto near = [](const auto& actual, const auto& expected) {
        double difference = 0, scale = 0;
        for (Index i = 0; i < expected.size(); ++i) {
            difference = std::max(difference, std::abs(static_cast<double>(actual.data()[i]) - expected.data()[i]));
            scale = std::max(scale, std::abs(expected.data()[i]));
        }
        return difference <= 1e-5 * scale;
    };
    CHECK(near(in_float(policy, x_in_float), ff(policy, x)));
    auto gradients = zeros_like_parameters(policy, ff);
    auto gradients_in_float = zeros_like_parameters(policy, in_float);
    auto d_x = tensor_like(policy, x);
    auto d_x_in_float = tensor_like(policy, x_in_float);
    ff.backward(policy, {}, d_x.view(), d_out, x, gradients);
    in_float.backward(policy, {}, d_x_in_float.view(), d_in_float, x_in_float, gradients_in_float);
    CHECK(near(d_x_in_float, d_x));
    GatedFeedForward<double, Cpu>::each_parameter(
        [&](const std::string& name, const auto& expected, const auto& actual) {
            CAPTURE(name);
            CHECK(near(actual, expected));
        },
        "", gradients, gradients_in_float);
}

TEST_CASE("GatedFeedForward: light and heavy branch of the routed feedforward, under T5's names") {
    for (const MemoryPlan plan : {MemoryPlan{4096, false}, {4, true}}) {
        const Cpu policy(1, plan);
        GatedModule module(policy, Seed{1});
        auto x = normal<double>(policy, std::array<Index, 3>{2, 9, 5}, 0, 0.7);
        const auto mask = mask_of_lengths(policy, {7, 2}, 9);
        const auto routing = module.router.route(policy, x.const_view(), mask.const_view(), 3);
        auto expected = tensor_like(policy, x);
        for (Index b = 0; b < 2; ++b)
            for (Index i = 0; i < 9; ++i) {
                Row y = evaluate_gated(module.light_ff, row_of(x, b, i));
                const Row heavy = evaluate_gated(module.heavy_ff, row_of(x, b, i));
                for (Index j = 0; j < 3; ++j)
                    for (std::size_t e = 0; e < y.size(); ++e)
                        if (routing.indices.const_view()(b, 0, j) == i)
                            y[e] += routing.scores.const_view()(b, 0, j) * heavy[e];
                std::copy(y.begin(), y.end(), expected.view()[b][i].data());
            }
        CHECK(relative_error(module(x, mask.const_view()), expected) <= 1e-12);
        check_gradients(module, x, {});
        check_gradients(module, x, mask.const_view());
        check_gradients(module, x, mask.const_view(), FeedForwardCounts{5}, Residual::tokens);
        auto shorter = resized(policy, x, 3);  // n <= k
        check_gradients(module, shorter, {});

        std::vector<std::string> names;
        GatedModule::each_parameter([&](const std::string& name, const auto&) { names.push_back(name); }, "", module);
        CHECK(names == std::vector<std::string>{"router.routing_token", "light_ff.norm.gamma", "light_ff.wi_0.weight",
                                                "light_ff.wi_1.weight", "light_ff.wo.weight", "heavy_ff.norm.gamma",
                                                "heavy_ff.wi_0.weight", "heavy_ff.wi_1.weight", "heavy_ff.wo.weight"});
        CHECK(module.light_ff.wi_0.weight.shape() == std::array<Index, 2>{3, 5});
        CHECK(module.heavy_ff.wo.weight.shape() == std::array<Index, 2>{5, 7});
    }
}

TEST_CASE("GatedFeedForward: errors name the parameter or argument and both shapes") {
    const Cpu policy(1);
    SeedSequence seeds(Seed{1});
    GatedFeedForward<float, Cpu> ff(policy, seeds, 5, 7);
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 4, 5}, 0);
    const auto longer = normal<float>(policy, std::array<Index, 3>{2, 6, 5}, 0);
    auto d_x = tensor_like(policy, x);
    auto gradients = zeros_like_parameters(policy, ff);
    CHECK_THROWS_WITH_AS(ff.backward(policy, {}, d_x.view(), longer, x, gradients),
                         "colt5: `d_out` must have shape (2, 4, 5), but has (2, 6, 5)", ShapeError);
    const auto saved = ff.forward(policy, d_x.view(), x, true);
    auto d_longer = tensor_like(policy, longer);
    CHECK_THROWS_WITH_AS(ff.backward(policy, saved, d_longer.view(), longer, longer, gradients),
                         "colt5: `saved.gate` must have shape (2, 6, 7), but has (2, 4, 7)", ShapeError);
    ff.wi_1.weight = {policy, {6, 5}};
    CHECK_THROWS_WITH_AS(ff(policy, x), "colt5: `wi_1.weight` must have shape (7, 5), but has (6, 5)", ShapeError);
}

TEST_CASE_TEMPLATE("gated feedforwards: batched equals one at a time, bit for bit", T, float, double) {
    check_batched_equals_alone<Block<T>>();
}
TEST_CASE_TEMPLATE("gated feedforwards: padding never changes a real token, and may hold anything", T, float, double) {
    check_padding_is_not_seen<Block<T>>();
    check_padding_may_hold_anything<Block<T>>();
}
TEST_CASE_TEMPLATE("gated feedforwards: the same bits from run to run and with any number of threads", T, float,
                   double) {
    check_threads_change_nothing<Block<T>>();
}
