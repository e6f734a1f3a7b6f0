// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <colt5/cuda.cuh>

#include <cmath>
#include <cstddef>
#include <vector>

#include "numbers.hpp"

/// Embeddings of ids that are out of range, and the order of sums.
namespace cases {

using namespace colt5;

/// What is out of range is NaN, gets no gradient and writes nowhere; expect_ids names it. The same bits each time.
template <typename T>
void check_embedding() {
    const Cuda policy;
    constexpr Index vocabulary = 50, dim = 24, length = 3000;
    const auto weight = normal_rows<T>(policy, vocabulary, dim, 1, 1);
    std::vector<TokenIndex> host;
    for (Index i = 0; i < length; ++i) host.push_back(static_cast<TokenIndex>(i * i % 37));
    const auto good = from_host<MatrixTensor<TokenIndex, Cuda>>(policy, {1, length}, host);
    expect_ids(policy, good, vocabulary);
    host[7] = -3;
    host[2900] = vocabulary;
    const auto ids = from_host<MatrixTensor<TokenIndex, Cuda>>(policy, {1, length}, host);
    CHECK_THROWS_WITH_AS(expect_ids(policy, ids, vocabulary), "colt5: `ids` must be in a vocabulary of 50, but is -3",
                         ValueError);
    const auto out = numbers(policy, embedding(policy, weight, ids));
    const auto table = numbers(policy, weight);
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < host.size(); ++i)
        for (std::size_t j = 0; j < dim; ++j) {
            const double value = out[i * dim + j];
            wrong += host[i] < 0 || host[i] >= vocabulary ? !std::isnan(value)
                                                          : value != table[static_cast<std::size_t>(host[i]) * dim + j];
        }
    CHECK(wrong == 0);

    TokensTensor<T, Cuda> d_out(policy, {1, length, dim});
    fill_normal(policy, d_out, Random(Seed{2}));
    const auto gradient = [&](const auto& of) {
        MatrixTensor<accumulate_t<T>, Cuda> d_weight(policy, {vocabulary, dim});
        set_zero(policy, d_weight);
        embedding_vjp(policy, d_weight.view(), d_out, of);
        return numbers(policy, d_weight);
    };
    const auto with_wrong = gradient(ids);
    for (int call = 0; call < 3; ++call) CHECK(gradient(ids) == with_wrong);
    auto values = to_host(policy, d_out);
    for (const std::size_t row : {std::size_t{7}, std::size_t{2900}})
        for (std::size_t j = 0; j < dim; ++j) values[row * dim + j] = T(0);
    upload(policy, d_out.data(), values.data(), values.size() * sizeof(T));
    CHECK(largest_error(gradient(good), with_wrong) < 1e-6);
}

}  // namespace cases
