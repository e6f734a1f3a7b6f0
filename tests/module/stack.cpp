// SPDX-License-Identifier: MIT
#include <colt5/module/stack.hpp>

#include <algorithm>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr TransformerBlockConfig by_descent = small_block(0, RouterType::coor_descent),
                                 by_sinkhorn = small_block(0, RouterType::sinkhorn);
template <typename T>
using Descent = ConditionalRoutedTransformerBlock<by_descent, T, Cpu>;
using Noisy = ConditionalRoutedTransformerBlock<by_sinkhorn, double, Cpu>;

template <typename Gradients, typename Module>
bool same_gradients(const Module&, const Gradients& a, const Gradients& b) {
    bool same = true;
    Module::each_parameter([&](const std::string&, const auto& x, const auto& y) { same = same && same_bits(x, y); },
                           "", a, b);
    return same;
}

}  // namespace

TEST_CASE_TEMPLATE("Stack: is one layer behind the other, forward and backward", T, float, double) {
    const Cpu policy(2);
    const Stack<Descent<T>, 3> stack(policy, Seed{4});
    const auto x = normal<T>(policy, std::array<Index, 3>{2, 21, 6}, 0);
    const auto d_out = normal<T>(policy, x.shape(), 1);
    const auto some = random_mask(policy, std::array<Index, 2>{2, 21}, 2);
    for (const Mask mask : {Mask(), some.const_view()}) {
        const TransformerBlockCounts counts{.num_heavy_ff_tokens = 7};
        const auto first = stack.layers[0].forward(x, mask, counts);
        const auto second = stack.layers[1].forward(first.out, mask, counts);
        const auto third = stack.layers[2].forward(second.out, mask, counts);
        auto expected = stack.make_gradients(), gradients = stack.make_gradients();
        const auto d_second = stack.layers[2].backward(third, d_out, expected.layers[2]);
        const auto d_first = stack.layers[1].backward(second, d_second, expected.layers[1]);
        const auto d_x = stack.layers[0].backward(first, d_first, expected.layers[0]);

        CHECK(same_bits(stack(x, mask, counts), third.out));
        auto given = filled<T>(policy, x.shape(), 7);
        const T* const where = given.data();
        const auto out = stack(x, mask, counts, std::move(given));
        CHECK(out.data() == where);
        CHECK(same_bits(out, third.out));
        auto given_to_forward = filled<T>(policy, x.shape(), 7), into = filled<T>(policy, x.shape(), 7);
        const T *const place = given_to_forward.data(), *const place_of_d = into.data();
        const auto saved = stack.forward(x, mask, counts, std::move(given_to_forward));
        CHECK(saved.out.data() == place);
        CHECK(same_bits(saved.out, third.out));
        const auto d_tokens = stack.backward(saved, d_out, gradients, std::move(into));
        CHECK(d_tokens.data() == place_of_d);
        CHECK(same_bits(d_tokens, d_x));
        CHECK(same_gradients(stack, gradients, expected));
        Index routers = 0;
        saved.each_router([&](const std::string&, const auto&) { ++routers; });
        CHECK(routers == 9);
    }
}

TEST_CASE_TEMPLATE("Stack: checkpoints change no bit and save memory", Block, Descent<double>, Descent<float>, Noisy) {
    using T = typename Block::Out::value_type;
    const Cpu policy(2);
    const auto x = normal<T>(policy, std::array<Index, 3>{2, 80, 6}, 0);
    const auto d_out = normal<T>(policy, x.shape(), 1);
    Stack<Block, 4> kept(policy, Seed{4}), checkpointed(policy, Seed{4});  // each counts its own calls
    checkpointed.checkpoints = Checkpoints::layers;
    auto of_kept = kept.make_gradients(), of_checkpointed = kept.make_gradients();
    for (int call = 0; call < 2; ++call) {
        const auto base = policy.workspace()->statistics().in_use;
        auto saved = kept.forward(x);
        const auto bytes = policy.workspace()->statistics().in_use - base;
        auto sparse = checkpointed.forward(x);
        CHECK(policy.workspace()->statistics().in_use - base - bytes < bytes / 2);
        CHECK(same_bits(sparse.out, saved.out));
        const auto another = checkpointed.forward(x);  // noise goes on before backward
        const auto further = kept.forward(x);
        CHECK(same_bits(another.out, further.out));
        const auto d_x = kept.backward(std::move(saved), d_out, of_kept);
        CHECK(same_bits(checkpointed.backward(std::move(sparse), d_out, of_checkpointed), d_x));
        CHECK(same_gradients(kept, of_checkpointed, of_kept));
    }
}

TEST_CASE("Stack: gradients by finite differences" * not_sanitized) {
    const Cpu policy(1);
    Stack<Descent<double>, 2> stack(policy, Seed{4});
    auto x = normal<double>(policy, std::array<Index, 3>{1, 12, 6}, 0);
    const auto d_out = normal<double>(policy, x.shape(), 1);
    stack.checkpoints = Checkpoints::layers;
    auto gradients = stack.make_gradients();
    const auto d_x = stack.backward(stack.forward(x), d_out, gradients);
    const auto loss = [&] { return inner(d_out, stack(x)); };
    CHECK(relative_error(d_x, finite_differences(policy, x, loss)) <= 1e-6);
    check_parameter_gradients(policy, stack, gradients, loss);
}

TEST_CASE("Stack: layers draw parameters of their own, under names of their own") {
    const Cpu policy(1);
    const Stack<Descent<float>, 3> stack(policy, Seed{4});
    std::set<std::string> names;
    std::set<float> firsts;
    Index tokens = 0;
    stack.each_parameter(
        [&](const std::string& name, const auto& parameter) {
            CHECK(names.insert(name).second);
            if (name.find("routing_token") == std::string::npos) return;
            ++tokens;
            firsts.insert(parameter.data()[0]);
        },
        "model.", stack);
    CHECK(names.contains("model.layers.2.conditional_ff.router.routing_token"));
    CHECK(tokens == 9);
    CHECK(firsts.size() == 9);
    CHECK(count_parameters(stack) == 3 * count_parameters(stack.layers[0]));
}

TEST_CASE(
    "Stack: with checkpoints, a failed backward leaves the noise where it was, and one that is handed over frees") {
    const Cpu policy(1);
    Stack<Noisy, 4> stack(policy, Seed{4});
    stack.checkpoints = Checkpoints::layers;
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 40, 6}, 0);
    const auto calls = [&] {
        std::uint64_t sum = 0;
        each_state<Stack<Noisy, 4>>(
            [&](const std::string& name, std::uint64_t number) { sum += name.ends_with("calls") ? number : 0; }, "",
            stack);
        return sum;
    };
    auto saved = stack.forward(x);
    const auto before = calls();
    CHECK(before == 12);
    auto gradients = stack.make_gradients();
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 39}, 2);
    saved.mask = mask.const_view();  // does not fit
    CHECK_THROWS_WITH_AS(stack.backward(saved, x, gradients), "colt5: `mask` must have shape (2, 40), but has (2, 39)",
                         ShapeError);
    CHECK(calls() == before);
    saved.mask = {};
    const auto in_use = policy.workspace()->statistics().in_use;
    const auto d_x = stack.backward(std::move(saved), x, gradients);
    CHECK(policy.workspace()->statistics().in_use < in_use - 2 * static_cast<std::size_t>(x.size()) * sizeof(double));
    CHECK(calls() == before);
}

TEST_CASE("Stack: errors name the argument") {
    const Cpu policy(1);
    const Stack<Descent<float>, 2> stack(policy, Seed{4}), other(policy, Seed{4});
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 9, 6}, 0);
    auto gradients = stack.make_gradients();
    auto saved = stack.forward(x);
    CHECK_THROWS_WITH_AS(other.backward(saved, x, gradients),
                         "colt5: `saved` must be of this module, but is of another one of its type", ValueError);
    CHECK_THROWS_WITH_AS(stack.backward(saved, normal<float>(policy, std::array<Index, 3>{2, 8, 6}, 0), gradients),
                         "colt5: `d_out` must have shape (2, 9, 6), but has (2, 8, 6)", ShapeError);
    Stack<Descent<float>, 2>::Gradients none;
    CHECK_THROWS_AS(stack.backward(saved, x, none), Error);
    stack.backward(std::move(saved), x, gradients);
    CHECK_THROWS_AS(stack.backward(saved, x, gradients), ValueError);
}

TEST_CASE("Stack: a parameter of the wrong shape in a late layer throws before any layer counts a call") {
    const Cpu policy(1);
    for (const auto checkpoints : {Checkpoints::none, Checkpoints::layers}) {
        Stack<Noisy, 4> stack(policy, Seed{4});
        stack.checkpoints = checkpoints;
        const auto x = normal<double>(policy, std::array<Index, 3>{2, 40, 6}, 0);
        auto& weight = stack.layers[3].conditional_attn.heavy_attn.to_q.weight;
        auto kept = std::move(weight);
        weight = filled<double>(policy, std::array<Index, 2>{8, 5}, 1);
        const auto before = noise_state(stack);
        CHECK(!before.empty());
        CHECK_THROWS_WITH_AS(stack.forward(x), "colt5: `heavy_attn.to_q.weight` must have shape (8, 6), but has (8, 5)",
                             ShapeError);
        CHECK(noise_state(stack) == before);
        weight = std::move(kept);
        const Stack<Noisy, 4> untouched(policy, Seed{4});
        CHECK(same_bits(stack.forward(x).out, untouched.forward(x).out));
    }
}

TEST_CASE("Stack: takes sequences of different lengths") {
    const Cpu policy(2);
    const Stack<Descent<float>, 2> stack(policy, Seed{4});
    const Ragged ragged(stack);
    const std::vector<Index> cu_seqlens{0, 9, 9, 30};
    const auto tokens = normal<float>(policy, std::array<Index, 2>{30, 6}, 0);
    const auto out = ragged(tokens, cu_seqlens);
    const auto alone = stack(TokensView<const float>(tokens.view()[9].data(), {1, 21, 6}));
    CHECK(std::equal(alone.data(), alone.data() + alone.size(), out.view()[9].data()));
    auto gradients = stack.make_gradients();
    const auto saved = ragged.forward(tokens, cu_seqlens);
    CHECK(same_bits(saved.out, out));
    CHECK(ragged.backward(saved, tokens, gradients).size() == tokens.size());
}
