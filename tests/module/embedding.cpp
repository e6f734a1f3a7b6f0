// SPDX-License-Identifier: MIT
#include <colt5/module/embedding.hpp>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

HostTensor<TokenIndex, 2> some_ids(const Cpu& policy, Index batch, Index length, Index vocabulary) {
    HostTensor<TokenIndex, 2> ids(policy, {batch, length});
    for (Index i = 0; i < ids.size(); ++i) ids.data()[i] = static_cast<TokenIndex>(i * i % vocabulary);
    return ids;
}

}  // namespace

TEST_CASE_TEMPLATE("Embedding: the rows of its table, and their gradients back", T, float, double) {
    const Cpu policy(2);
    SeedSequence seeds{Seed{3}};
    const Embedding<T, Cpu> embedding(policy, seeds, 11, 5);
    for (const auto& shape : {std::array<Index, 2>{2, 40}, {3, 1}, {2, 0}, {1, 5000}}) {
        const auto ids = some_ids(policy, shape[0], shape[1], 11);
        const auto out = embedding(policy, ids);
        REQUIRE(out.shape() == std::array<Index, 3>{shape[0], shape[1], 5});
        const auto d_out = normal<T>(policy, out.shape(), 1);
        auto gradients = zeros_like_parameters(policy, embedding);
        fill(policy, gradients.weight, 2);
        auto expected = filled<T>(policy, embedding.weight.shape(), 2);
        for (Index i = 0; i < ids.size(); ++i)
            for (Index d = 0; d < 5; ++d) {
                CHECK(out.data()[i * 5 + d] == embedding.weight.const_view()(ids.data()[i], d));
                expected.view()(ids.data()[i], d) += d_out.data()[i * 5 + d];
            }
        embedding.backward(policy, d_out, ids, gradients);
        CHECK(relative_error(gradients.weight, expected) <= (std::is_same_v<T, double> ? 1e-14 : 1e-5));
    }
}

TEST_CASE("Embedding: with a head of the same weight, gradients by finite differences") {
    const Cpu policy(1);
    SeedSequence seeds{Seed{3}};
    Embedding<double, Cpu> embedding(policy, seeds, 7, 4, 0.5);
    const auto ids = some_ids(policy, 2, 9, 7), targets = some_ids(policy, 2, 9, 5);
    const auto d_losses = normal<double>(policy, ids.shape(), 1);
    const auto loss = [&] {
        return inner(d_losses, linear_cross_entropy(policy, embedding(policy, ids), embedding.weight, targets));
    };
    auto gradients = zeros_like_parameters(policy, embedding);
    const auto d_x = linear_cross_entropy_vjp(policy, d_losses, embedding(policy, ids), embedding.weight, targets,
                                              gradients.weight.view())
                         .d_x;
    embedding.backward(policy, d_x, ids, gradients);
    CHECK(relative_error(gradients.weight, finite_differences(policy, embedding.weight, loss)) <= 1e-8);
}

TEST_CASE("Embedding: an id outside of the vocabulary, and shapes that do not fit") {
    const Cpu policy(1);
    SeedSequence seeds{Seed{3}};
    const Embedding<float, Cpu> embedding(policy, seeds, 256, 4);
    auto ids = some_ids(policy, 2, 9, 256);
    auto gradients = zeros_like_parameters(policy, embedding);
    CHECK_THROWS_WITH_AS(
        embedding.backward(policy, normal<float>(policy, std::array<Index, 3>{2, 8, 4}, 0), ids, gradients),
        "colt5: `d_out` must have shape (2, 9, 4), but has (2, 8, 4)", ShapeError);
    for (const TokenIndex wrong : {256, -1}) {
        ids.data()[3] = wrong;
        const std::string message = "colt5: `ids` must be in a vocabulary of 256, but is " + std::to_string(wrong);
        CHECK_THROWS_WITH_AS(embedding(policy, ids), message.c_str(), ValueError);
        CHECK_THROWS_WITH_AS(expect_ids(policy, ids, 256), message.c_str(), ValueError);
        const auto d_out = normal<float>(policy, std::array<Index, 3>{2, 9, 4}, 0);
        CHECK_THROWS_WITH_AS(embedding.backward(policy, d_out, ids, gradients), message.c_str(), ValueError);
        CHECK(all_zero(gradients.weight));
    }
}
