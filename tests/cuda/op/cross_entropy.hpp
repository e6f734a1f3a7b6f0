// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <cstddef>

#include <colt5/module/embedding.hpp>
#include <colt5/module/layers.hpp>
#include <colt5/op/cross_entropy.hpp>

#include "../draw.hpp"

/// Cases of op/cross_entropy.hpp and module/embedding.hpp.
namespace cases {

template <typename T, typename P>
Results cross_entropy_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 5), dim = draw.size(1, 200), classes = draw.size(1, 400);
    const Index length = draw.length(2000, batch * classes);
    const auto x = draw.values(std::array{batch, length, dim});
    // Logits of about unit deviation: with larger ones, rounded products make exponentials of another size.
    const auto weight = draw.values(std::array{classes, dim}, 1 / std::sqrt(static_cast<double>(dim)));
    const auto bias = draw.values(std::array{classes});
    const auto targets = draw.indices(batch, length, classes);
    const auto d_losses = draw.sums(std::array{batch, length});
    auto d_weight = draw.sums(weight.shape());
    auto d_bias = draw.sums(bias.shape());
    const CrossEntropy how{.logits_at_a_time = draw.size(1, 2 * batch * length * classes)};
    record("losses", linear_cross_entropy(policy, x, weight, targets, bias.const_view(), how));
    const auto result = linear_cross_entropy_vjp(policy, d_losses, x, weight, targets, d_weight.view(),
                                                 bias.const_view(), d_bias.view(), how);
    record("losses with gradients", result.losses);
    record("d_x", result.d_x);
    record("d_weight", d_weight);
    record("d_bias", d_bias);
    return record.results;
}

template <typename T, typename P>
Results embedding_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 5), dim = draw.size(1, 200), vocabulary = draw.size(1, 400);
    const Index length = draw.length(4000, batch * dim);
    Embedding<T, P> embedding;
    embedding.weight = draw.values(std::array{vocabulary, dim});
    auto gradients = zeros_like_parameters(policy, embedding);
    const auto ids = draw.indices(batch, length, vocabulary);
    record("out", embedding(policy, ids));
    embedding.backward(policy, draw.values(std::array{batch, length, dim}), ids, gradients);
    record.in_float("d_weight", gradients.weight);
    return record.results;
}

/// The gradient of 65,536 tokens, in a vocabulary of bytes or of a tokenizer, some of whose ids are much more frequent
/// than others.
template <typename T, typename P>
Results long_embedding_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index length = sanitized() ? 2000 : 65536, dim = setting.seed % 2 == 0 ? 40 : 9;
    const Index vocabulary = setting.seed % 4 < 2 ? 256 : 32768;
    MatrixTensor<TokenIndex, P> ids(policy, {2, length / 2});
    const Random random(Seed{setting.seed}, 77);
    fill_with(policy, ids, [&](std::size_t i) {
        return std::floor(std::pow(random.uniform(i), 4) * static_cast<double>(vocabulary));
    });
    auto d_weight = draw.sums(std::array{vocabulary, dim});
    embedding_vjp(policy, d_weight.view(), draw.values(std::array{Index{2}, length / 2, dim}), ids);
    record.in_float("d_weight", d_weight);
    return record.results;
}

}  // namespace cases
