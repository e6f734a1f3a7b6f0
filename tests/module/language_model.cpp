// SPDX-License-Identifier: MIT
#include <colt5/module/language_model.hpp>

#include <array>
#include <set>
#include <string>
#include <utility>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr TransformerBlockConfig config = small_block(0), dropped = small_block(0.2),
                                 causal = small_block(0, RouterType::causal);
template <typename T, auto& of_block = config>
using Model = LanguageModel<Stack<ConditionalRoutedTransformerBlock<of_block, T, Cpu>, 2>>;
static_assert(TrainableModule<Model<float>>);

HostTensor<TokenIndex, 2> some_ids(const Cpu& policy, Index batch, Index length, Index vocabulary, Index factor = 1) {
    HostTensor<TokenIndex, 2> ids(policy, {batch, length});
    for (Index i = 0; i < ids.size(); ++i) ids.data()[i] = static_cast<TokenIndex>(i * i * factor % vocabulary);
    return ids;
}

}  // namespace

TEST_CASE_TEMPLATE("LanguageModel: is its parts, tied or not", T, float, double) {
    const Cpu policy(2);
    const auto mask = mask_of_lengths(policy, {17, 9}, 17);
    for (const bool tied : {true, false}) {
        const Model<T> model(policy, {.vocabulary = 11, .dim = 6, .tied = tied}, Seed{4});
        const auto ids = some_ids(policy, 2, 17, 11);
        auto targets = some_ids(policy, 2, 17, 11, 3);
        for (Index i = 9; i < 17; ++i) targets.view()(1, i) = -100;
        const auto d_losses = normal<T>(policy, ids.shape(), 1);
        const auto& weight = tied ? model.embedding.weight : model.head.weight;

        auto expected = model.make_gradients(), gradients = model.make_gradients();
        const auto x = embedding(policy, model.embedding.weight, ids);
        const auto saved = model.layers.forward(x, mask);
        const auto normed = rms_norm(policy, saved.out, model.head.norm.gamma);
        const auto loss =
            linear_cross_entropy_vjp(policy, d_losses, normed, weight, targets,
                                     tied ? expected.embedding.weight.view() : expected.head.weight.view());
        const auto d_out =
            rms_norm_vjp(policy, loss.d_x, saved.out, model.head.norm.gamma, expected.head.norm.gamma.view());
        const auto d_x = model.layers.backward(saved, d_out, expected.layers);
        embedding_vjp(policy, expected.embedding.weight.view(), d_x, ids);

        CHECK(same_bits(model.add_gradients(ids, targets, d_losses, gradients, mask), loss.losses));
        CHECK(same_bits(model.losses(ids, targets, mask), loss.losses));
        CHECK(same_bits(model.logits(ids, mask), linear(policy, normed, weight)));
        Model<T>::each_parameter(
            [&](const std::string& name, const auto& a, const auto& b) {
                CAPTURE(name);
                CHECK(same_bits(a, b));
            },
            "", gradients, expected);
        CHECK(loss.losses.const_view()(1, 12) == 0);
    }
}

TEST_CASE("LanguageModel: gradients by finite differences" * not_sanitized) {
    const Cpu policy(1);
    for (const bool tied : {true, false}) {
        Model<double> model(policy, {.vocabulary = 11, .dim = 6, .tied = tied}, Seed{4});
        auto ids = some_ids(policy, 1, 9, 11);
        for (Index i = 0; i < 9; ++i) ids.data()[i] = static_cast<TokenIndex>(i * 4 % 11);  // equal tokens would tie
        const auto targets = some_ids(policy, 1, 9, 11, 3);
        const auto d_losses = normal<double>(policy, ids.shape(), 1);
        auto gradients = model.make_gradients();
        model.add_gradients(ids, targets, d_losses, gradients);
        check_parameter_gradients(policy, model, gradients,
                                  [&] { return inner(d_losses, model.losses(ids, targets)); });
    }
}

TEST_CASE("LanguageModel: causal blocks see no later token, dropout is for training alone") {
    const Cpu policy(1);
    const Model<float, causal> model(policy, {.vocabulary = 11, .dim = 6}, Seed{4});
    auto ids = some_ids(policy, 1, 30, 11);
    const auto before = model.logits(ids);
    ids.data()[20] = (ids.data()[20] + 1) % 11;
    const auto after = model.logits(ids);
    for (Index i = 0; i < 20; ++i)
        for (Index v = 0; v < 11; ++v) CHECK(after.const_view()(0, i, v) == before.const_view()(0, i, v));
    CHECK(after.const_view()(0, 20, 0) != before.const_view()(0, 20, 0));

    const Model<float, dropped> noisy(policy, {.vocabulary = 11, .dim = 6}, Seed{4});
    const auto d_losses = filled<float>(policy, ids.shape(), 1);
    auto gradients = noisy.make_gradients();
    const auto losses = noisy.losses(ids, ids);
    CHECK_FALSE(same_bits(noisy.add_gradients(ids, ids, d_losses, gradients), losses));
    without_noise(noisy, [&] { CHECK(same_bits(noisy.add_gradients(ids, ids, d_losses, gradients), losses)); });
}

TEST_CASE("LanguageModel: a step that throws leaves the noise and the gradients as they were") {
    const Cpu policy(1);
    for (const bool tied : {true, false}) {
        const LanguageModelConfig settings{.vocabulary = 11, .dim = 6, .tied = tied};
        Model<float, dropped> model(policy, settings, Seed{4});
        const Model<float, dropped> untouched(policy, settings, Seed{4});
        const auto ids = some_ids(policy, 2, 8, 11);
        auto wrong = some_ids(policy, 2, 8, 11);
        wrong.data()[15] = 11;
        const auto d_losses = filled<float>(policy, ids.shape(), 1);
        auto gradients = model.make_gradients(), expected = model.make_gradients();
        const auto before = noise_state(model);
        CHECK(before.size() == 8);
        const auto throws = [&](const auto& call, const char* message) {
            CHECK_THROWS_WITH_AS(call(), message, Error);
            CHECK(noise_state(model) == before);
        };
        const auto step = [&](const auto& of_ids, const auto& targets, Mask mask = {}) {
            return model.add_gradients(of_ids, targets, d_losses, gradients, mask);
        };
        throws([&] { step(ids, wrong); }, "colt5: `targets` must be below the number of classes, 11, but is 11");
        throws([&] { step(wrong, ids); }, "colt5: `ids` must be in a vocabulary of 11, but is 11");
        const auto narrow = mask_of_lengths(policy, {7, 7}, 7);
        throws([&] { step(ids, ids, narrow); }, "colt5: `mask` must have shape (2, 8), but has (2, 7)");
        auto& gamma = model.head.norm.gamma;
        auto kept = std::move(gamma);
        gamma = filled<float>(policy, std::array<Index, 1>{5}, 1);
        auto of_wrong = model.make_gradients();
        throws([&] { model.add_gradients(ids, ids, d_losses, of_wrong); },
               "colt5: `head.norm.gamma` must have shape (6), but has (5)");
        gamma = std::move(kept);
        CHECK(same_bits(step(ids, ids), untouched.add_gradients(ids, ids, d_losses, expected)));
        Model<float, dropped>::each_parameter(
            [&](const std::string&, const auto& a, const auto& b) { CHECK(same_bits(a, b)); }, "", gradients, expected);
    }
}

TEST_CASE("LanguageModel: names, and what does not fit") {
    const Cpu policy(1);
    Model<float> tied(policy, {.vocabulary = 11, .dim = 6}),
        untied(policy, {.vocabulary = 11, .dim = 6, .tied = false});
    const auto names = [](const auto& model) {
        std::set<std::string> all;
        model.each_parameter([&](const std::string& name, const auto&) { CHECK(all.insert(name).second); }, "", model);
        return all;
    };
    CHECK(names(tied).contains("embedding.weight"));
    CHECK(names(tied).contains("layers.1.conditional_ff.light_ff.0.gamma"));
    CHECK(names(tied).contains("head.norm.gamma"));
    CHECK(!names(tied).contains("head.weight"));
    CHECK(names(untied).contains("head.weight"));

    const auto ids = some_ids(policy, 1, 8, 11);
    const auto d_losses = filled<float>(policy, ids.shape(), 1);
    auto of_tied = tied.make_gradients();
    CHECK_THROWS_WITH_AS(untied.add_gradients(ids, ids, d_losses, of_tied),
                         "colt5: `gradients.head.weight` must be a tensor, as of make_gradients(), but is empty",
                         ValueError);
    CHECK_THROWS_WITH_AS(untied.logits(some_ids(policy, 1, 8, 100)),
                         "colt5: `ids` must be in a vocabulary of 11, but is 16", ValueError);
    CHECK_THROWS_WITH_AS(tied.head.logits(policy, tied.layers(embedding(policy, tied.embedding.weight, ids))),
                         "colt5: `tied` must be a weight, since the head has none, but is absent", ValueError);
    CHECK_THROWS_WITH_AS(
        untied.head.logits(policy, tied.layers(embedding(policy, tied.embedding.weight, ids)), tied.embedding.weight),
        "colt5: `tied` must be absent, since the head has a weight, but is there", ValueError);
    const auto x = filled<float>(policy, std::array<Index, 3>{1, 8, 6}, 1);
    const auto narrow = filled<float>(policy, std::array<Index, 2>{11, 5}, 1);
    auto gradients = zeros_like_parameters(policy, tied.head);
    const MatrixView<const float> weight = tied.embedding.weight;
    CHECK_THROWS_WITH_AS(tied.head.logits(policy, x, narrow), "colt5: `tied` must have shape (any, 6), but has (11, 5)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(Model<float>(policy, {.vocabulary = 11, .dim = 8}),
                         "colt5: `dim` must be that of the layers, 6, but is 8", ValueError);
    CHECK_THROWS_WITH_AS(Model<float>(policy, {.vocabulary = 0, .dim = 6}),
                         "colt5: `vocabulary` must be >= 1, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(tied.head.backward(policy, d_losses, x, ids.const_view(), gradients, weight),
                         "colt5: `d_tied` must be there, but is absent", ValueError);
}
