// SPDX-License-Identifier: MIT
#include "module/checks.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

/// Modules on memory of others: parameters, gradients and results where the caller wants them, with the same bits.

using namespace colt5;
using namespace support;

namespace {

using Shape = std::array<Index, 3>;

/// Memory of the caller, in which tensors are adopted. Its values start as 7, so that what is not written shows.
class Memory {
public:
    template <typename Result>
    Result adopt(const typename Result::Shape& shape) {
        std::size_t size = 1;
        for (const Index extent : shape) size *= static_cast<std::size_t>(extent);
        blocks_.push_back(std::make_unique<std::vector<double>>(size, 7.0));
        return Result::adopt(blocks_.back()->data(), shape);
    }
    bool has(const void* data) const {
        return std::any_of(blocks_.begin(), blocks_.end(), [&](const auto& block) { return block->data() == data; });
    }

private:
    std::vector<std::unique_ptr<std::vector<double>>> blocks_;
};

/// run(module, out) returns saved activations, whose output is in `out` unless that is empty; evaluate(module, out)
/// the output. empty_inputs() are the inputs' gradients that backward returns, for it to make, and in(memory) where
/// they may be. each(gradients, f) visits them.
template <typename Module, typename Run, typename Evaluate, typename In, typename Each>
void check(const Run& run, const Evaluate& evaluate, const typename Module::Out::Shape& shape, const In& in,
           const Each& each) {
    using Out = typename Module::Out;
    const Cpu policy(2);
    const Module usual(policy, Seed{1});
    const auto d_out = normal<double>(policy, shape, 5);
    auto gradients = usual.make_gradients();
    auto saved = run(usual, Out());
    const auto out = copy_of(policy, saved.out);
    const auto d = usual.backward(std::move(saved), d_out, gradients);

    Memory memory;
    Module module(policy, Seed{2});
    auto into = module.make_gradients();
    Module::each_parameter(
        [&](const std::string&, auto& parameter, auto& gradient, const auto& value) {
            using Parameter = std::remove_cvref_t<decltype(parameter)>;
            using Gradient = std::remove_cvref_t<decltype(gradient)>;
            parameter = memory.adopt<Parameter>(value.shape());
            assign(policy, parameter, as_expression(value));
            gradient = memory.adopt<Gradient>(value.shape());
            set_zero(policy, gradient);
        },
        "", module, into, usual);
    const auto alone = evaluate(module, memory.adopt<Out>(shape));
    CHECK(memory.has(alone.data()));
    CHECK(same_bits(alone, out));

    auto of_module = run(module, memory.adopt<Out>(shape));
    const auto moved_away = std::move(of_module.out);
    CHECK(memory.has(moved_away.data()));
    CHECK(same_bits(moved_away, out));
    const auto d_in_place = module.backward(std::move(of_module), d_out, into, in(memory));
    each(d, d_in_place, [&](const auto& expected, const auto& actual) {
        CHECK(memory.has(actual.data()));
        CHECK(same_bits(actual, expected));
    });
    Module::each_parameter(
        [&](const std::string& name, const auto& expected, const auto& actual) {
            CAPTURE(name);
            CHECK(memory.has(actual.data()));
            CHECK(same_bits(actual, expected));
        },
        "", gradients, into);

    Memory wrong;
    auto longer = shape;
    ++longer[1];
    CHECK_THROWS_AS(run(module, wrong.adopt<Out>(longer)), ShapeError);
    CHECK_THROWS_AS(evaluate(module, wrong.adopt<Out>(longer)), ShapeError);
}

constexpr Shape shape{2, 21, 8};

template <typename Module, typename... Options>
void check_of_tokens(const Options&... options) {
    const Cpu policy(1);
    const auto x = normal<double>(policy, shape, 0);
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 21}, 3);
    using Out = TokensTensor<double, Cpu>;
    check<Module>(
        [&](const Module& module, Out out) { return module.forward(x, mask, {}, options..., std::move(out)); },
        [&](const Module& module, Out out) { return module(x, mask, {}, options..., std::move(out)); }, shape,
        [](Memory& memory) { return memory.adopt<Out>(shape); },
        [](const Out& expected, const Out& actual, const auto& f) { f(expected, actual); });
}

}  // namespace

TEST_CASE("adopted memory: the feedforward") {
    constexpr FeedForwardConfig config{.dim = 8, .num_heavy_tokens = 4};
    check_of_tokens<ConditionalRoutedFeedForward<config, double, Cpu>>(Residual::tokens);
}

TEST_CASE("adopted memory: attention, with null tokens") {
    constexpr AttentionConfig config{.dim = 8,
                                     .num_heavy_tokens_q = 4,
                                     .num_heavy_tokens_kv = 5,
                                     .light_dim_head = 4,
                                     .light_heads = 2,
                                     .light_window_size = 4,
                                     .heavy_dim_head = 4,
                                     .heavy_heads = 2,
                                     .use_null_kv = true,
                                     .use_null_q_tokens = true};
    check_of_tokens<ConditionalRoutedAttention<config, double, Cpu>>(Residual::none);
}

TEST_CASE("adopted memory: the block") {
    constexpr TransformerBlockConfig config{.dim = 8,
                                            .num_heavy_attn_tokens_q = 4,
                                            .num_heavy_attn_tokens_kv = 5,
                                            .num_heavy_ff_tokens = 6,
                                            .light_dim_head = 4,
                                            .light_heads = 2,
                                            .light_window_size = 4,
                                            .heavy_dim_head = 4,
                                            .heavy_heads = 2};
    check_of_tokens<ConditionalRoutedTransformerBlock<config, double, Cpu>>();
}

TEST_CASE("adopted memory: cross attention, with and without routed queries") {
    constexpr CrossAttentionConfig config{
        .dim = 8, .num_tokens_q = 5, .num_tokens_kv = 6, .dim_head = 4, .heads = 2, .kv_routing_tokens = 2};
    using Module = ConditionalRoutedCrossAttention<config, double, Cpu>;
    using Inputs = Module::InputGradients;
    using Out = TokensTensor<double, Cpu>;
    const Cpu policy(1);
    for (const Index length : {9, 4})
        for (const Index of_context : {13, 6}) {
            const Shape shape_x{2, length, 8}, shape_context{2, of_context, 8};
            const auto x = normal<double>(policy, shape_x, 0), context = normal<double>(policy, shape_context, 1);
            check<Module>(
                [&](const Module& module, Out out) { return module.forward(x, context, {}, {}, {}, std::move(out)); },
                [&](const Module& module, Out out) { return module(x, context, {}, {}, {}, std::move(out)); }, shape_x,
                [&](Memory& memory) {
                    return Inputs{memory.adopt<Out>(shape_x), memory.adopt<Out>(shape_context)};
                },
                [](const Inputs& expected, const Inputs& actual, const auto& f) {
                    f(expected.d_x, actual.d_x);
                    f(expected.d_context, actual.d_context);
                });
        }
}

TEST_CASE("adopted memory: image attention, with padding and a mask") {
    constexpr ImageAttentionConfig config{.dim = 8,
                                          .num_heavy_tokens_q = 5,
                                          .num_heavy_tokens_kv = 6,
                                          .light_dim_head = 4,
                                          .light_heads = 2,
                                          .light_window_size = 2,
                                          .heavy_dim_head = 4,
                                          .heavy_heads = 2,
                                          .channel_first = true};
    using Module = ConditionalRoutedImageAttention<config, double, Cpu>;
    using Out = Module::Out;
    const Cpu policy(1);
    const Out::Shape of_maps{2, 8, 5, 4};
    const auto maps = normal<double>(policy, of_maps, 0);
    const auto mask = random_mask(policy, std::array<Index, 3>{2, 5, 4}, 3);
    check<Module>(
        [&](const Module& module, Out out) { return module.forward(maps, mask, {}, Residual::tokens, std::move(out)); },
        [&](const Module& module, Out out) { return module(maps, mask, {}, Residual::tokens, std::move(out)); },
        of_maps, [&](Memory& memory) { return memory.adopt<Out>(of_maps); },
        [](const Out& expected, const Out& actual, const auto& f) { f(expected, actual); });
}
