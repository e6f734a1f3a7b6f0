// SPDX-License-Identifier: MIT
#include <colt5/module/dropout.hpp>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr TransformerBlockConfig without = small_block(0), with = small_block(0.3);
template <typename T>
using Block = ConditionalRoutedTransformerBlock<with, T, Cpu>;
template <typename T>
using Plain = ConditionalRoutedTransformerBlock<without, T, Cpu>;
static_assert(sizeof(Plain<float>) < sizeof(Block<float>));

std::vector<std::uint64_t> calls_of(const auto& module) {
    std::vector<std::uint64_t> calls;
    each_state<std::remove_cvref_t<decltype(module)>>(
        [&](const std::string& name, std::uint64_t number) {
            if (name.ends_with("calls")) calls.push_back(number);
        },
        "", module);
    return calls;
}
void set_calls(const auto& module, std::uint64_t calls) {
    each_state<std::remove_cvref_t<decltype(module)>>(
        [&](const std::string& name, std::uint64_t& number) {
            if (name.ends_with("calls")) number = calls;
        },
        "", const_cast<std::remove_cvref_t<decltype(module)>&>(module));
}

}  // namespace

TEST_CASE_TEMPLATE("Dropout: a block is its halves with dropout between them, and anew at each call", T, float,
                   double) {
    const Cpu policy(2);
    const Block<T> block(policy, Seed{4});
    const Plain<T> plain(policy, Seed{4});
    auto x = normal<T>(policy, std::array<Index, 3>{2, 21, 6}, 0);
    const auto some = random_mask(policy, std::array<Index, 2>{2, 21}, 2);
    for (const Mask mask : {Mask(), some.const_view()}) {
        CHECK(same_bits(block(x, mask), plain(x, mask)));
        const DropoutMask of_attn{block.attn_dropout.noise.random(), 0.3}, of_ff{block.ff_dropout.noise.random(), 0.3};
        auto h = block.conditional_attn(x, mask);
        dropout(policy, h.view(), h, of_attn, x.const_view(), mask);
        auto out = block.conditional_ff(h, mask);
        dropout(policy, out.view(), out, of_ff, h.const_view(), mask);
        const auto saved = block.forward(x, mask);
        CHECK(same_bits(saved.out, out));
        CHECK_FALSE(same_bits(block.forward(x, mask).out, out));
    }
    CHECK(calls_of(block) == std::vector<std::uint64_t>{4, 4});
    without_noise(block, [&] { CHECK(same_bits(block.forward(x).out, plain(x))); });
    block.attn_dropout.noise.evaluates = block.ff_dropout.noise.evaluates = true;
    auto gradients = block.make_gradients();
    auto of_plain = plain.make_gradients();
    const auto d_out = normal<T>(policy, x.shape(), 1);
    CHECK(same_bits(block.backward(block.forward(x), d_out, gradients),
                    plain.backward(plain.forward(x), d_out, of_plain)));
    CHECK(calls_of(block) == std::vector<std::uint64_t>{4, 4});
}

TEST_CASE("Dropout: gradients of a block and of a stack with checkpoints by finite differences" * not_sanitized) {
    const Cpu policy(1);
    Stack<Block<double>, 2> stack(policy, Seed{4});
    auto x = normal<double>(policy, std::array<Index, 3>{1, 12, 6}, 0);
    const auto d_out = normal<double>(policy, x.shape(), 1);
    const auto loss = [&] {
        set_calls(stack, 3);
        return inner(d_out, stack.forward(x).out);
    };
    set_calls(stack, 3);
    auto gradients = stack.make_gradients();
    const auto d_x = stack.backward(stack.forward(x), d_out, gradients);
    CHECK(gradient_error(d_x, finite_differences(policy, x, loss)) <= gradient_tolerance);
    check_parameter_gradients(policy, stack, gradients, loss);

    set_calls(stack, 3);
    stack.checkpoints = Checkpoints::layers;
    auto again = stack.make_gradients();
    auto saved = stack.forward(x);
    stack.forward(x);  // noise goes on before backward
    CHECK(same_bits(stack.backward(std::move(saved), d_out, again), d_x));
    CHECK(calls_of(stack) == std::vector<std::uint64_t>(4, 5));
    Stack<Block<double>, 2>::each_parameter(
        [&](const std::string&, const auto& a, const auto& b) { CHECK(same_bits(a, b)); }, "", gradients, again);
}

TEST_CASE("Dropout: checkpoints repeat the noise that forward had, whatever it is when backward runs") {
    const Cpu policy(1);
    Stack<Block<double>, 2> stack(policy, Seed{4});
    const auto x = normal<double>(policy, std::array<Index, 3>{1, 12, 6}, 0);
    const auto d_out = normal<double>(policy, x.shape(), 1);
    const auto run = [&](Checkpoints checkpoints) {
        stack.checkpoints = checkpoints;
        auto gradients = stack.make_gradients();
        auto saved = without_noise(stack, [&] { return stack.forward(x); });
        auto d_x = stack.backward(std::move(saved), d_out, gradients);
        return std::pair(std::move(d_x), std::move(gradients));
    };
    const auto expected = run(Checkpoints::none), again = run(Checkpoints::layers);
    CHECK(same_bits(again.first, expected.first));
    Stack<Block<double>, 2>::each_parameter(
        [&](const std::string&, const auto& a, const auto& b) { CHECK(same_bits(a, b)); }, "", expected.second,
        again.second);
    CHECK(stack.layers[0].ff_dropout.noise.is_on());  // as before
}

TEST_CASE("Dropout: the second call of a shape allocates nothing") {
    const Cpu policy(1, Cpu::usual_plan, Allocations::together);
    const Block<float> block(policy, Seed{4});
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 21, 6}, 0);
    const auto d_out = normal<float>(policy, x.shape(), 1);
    auto gradients = block.make_gradients();
    const auto step = [&] { return block.backward(block.forward(x), d_out, gradients); };
    step();
    step();
    const auto allocations = policy.workspace()->statistics().system_allocations;
    step();
    CHECK(policy.workspace()->statistics().system_allocations == allocations);
}

TEST_CASE("Dropout: padding reaches nothing") {
    const Cpu policy(1);
    const Block<float> block(policy, Seed{4});
    auto x = normal<float>(policy, std::array<Index, 3>{2, 21, 6}, 0);
    const auto mask = mask_of_lengths(policy, {21, 10}, 21);
    set_calls(block, 0);
    const auto clean = block.forward(x, mask);
    for (Index i = 10; i < 21; ++i)
        for (Index j = 0; j < 6; ++j) x.view()(1, i, j) = i % 2 == 0 ? INFINITY : std::nanf("");
    set_calls(block, 0);
    const auto dirty = block.forward(x, mask);
    CHECK(all_finite(dirty.out));
    CHECK(same_bits(sequence(dirty.out, 0), sequence(clean.out, 0)));
    for (Index i = 0; i < 10; ++i)
        for (Index j = 0; j < 6; ++j) CHECK(dirty.out.const_view()(1, i, j) == clean.out.const_view()(1, i, j));
}
