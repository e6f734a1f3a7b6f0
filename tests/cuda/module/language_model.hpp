// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <string>

#include <colt5/module/conditional_routed_transformer_block.hpp>
#include <colt5/module/language_model.hpp>
#include <colt5/module/stack.hpp>

#include "../draw.hpp"
#include "stack.hpp"

/// Cases of module/head.hpp and module/language_model.hpp.
namespace cases {

template <typename T, typename P>
Results head_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 5), dim = draw.size(2, 200), vocabulary = draw.size(1, 400);
    const Index length = draw.length(2000, batch * vocabulary);
    const bool tied = draw.chance(0.5);
    const auto weight = draw.values(std::array{vocabulary, dim});
    Head<T, P> head(policy, dim);
    head.norm.gamma = draw.values(std::array{dim});
    if (!tied) head.weight = draw.values(std::array{vocabulary, dim});
    auto gradients = zeros_like_parameters(policy, head);
    auto d_tied = draw.sums(weight.shape());
    const auto given = tied ? weight.const_view() : MatrixView<const T>();
    const auto x = draw.tokens(std::array{batch, length, dim});
    const auto targets = draw.indices(batch, length, vocabulary);
    const auto d_losses = draw.sums(targets.shape());
    record("losses", head.losses(policy, x, targets.const_view(), given));
    const auto result = head.backward(policy, d_losses, x, targets.const_view(), gradients, given,
                                      tied ? d_tied.view() : MatrixView<accumulate_t<T>>());
    record("losses with gradients", result.losses);
    record("d_x", result.d_x, Kind::amplified);
    record("d_gamma", gradients.norm.gamma, Kind::amplified);
    if (tied)
        record("d_tied", d_tied);
    else
        record("d_weight", gradients.weight);
    return record.results;
}

/// A model is its parts, bit for bit; what those compute is for other cases.
template <typename T, typename P>
Results language_model_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    using Model = LanguageModel<Stack<ConditionalRoutedTransformerBlock<stacked_config, T, P>, 2>>;
    const bool tied = draw.chance(0.5);
    const Index vocabulary = draw.size(2, 300), batch = draw.size(1, 3), length = draw.length(500);
    const LanguageModelConfig config{.vocabulary = vocabulary, .dim = stacked_config.dim, .tied = tied};
    const Model model(policy, config, Seed{setting.seed}), same_model(policy, config, Seed{setting.seed});
    const auto ids = draw.indices(batch, length, vocabulary), targets = draw.indices(batch, length, vocabulary);
    const auto d_losses = draw.sums(ids.shape());
    auto gradients = model.make_gradients(), expected = model.make_gradients();
    const auto losses = model.add_gradients(ids, targets, d_losses, gradients);

    const auto& parts = same_model;
    const auto x = embedding(policy, parts.embedding.weight, ids);
    auto saved = parts.layers.forward(x);
    const auto loss = parts.head.backward(policy, d_losses, saved.out, targets.const_view(), expected.head,
                                          tied ? parts.embedding.weight.const_view() : MatrixView<const T>(),
                                          tied ? expected.embedding.weight.view() : MatrixView<accumulate_t<T>>());
    const auto d_x = parts.layers.backward(saved, loss.d_x, expected.layers);
    embedding_vjp(policy, expected.embedding.weight.view(), d_x, ids);
    record.holds("the same losses", same_bits(policy, losses, loss.losses));
    bool parameters = true;
    Model::each_parameter(
        [&](const std::string&, const auto& a, const auto& b) { parameters = parameters && same_bits(policy, a, b); },
        "", gradients, expected);
    record.holds("the same gradients", parameters);
    return record.results;
}

}  // namespace cases
