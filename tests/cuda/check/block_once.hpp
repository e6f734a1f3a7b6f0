// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda.cuh>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "numbers.hpp"

/// A small block for checks that need one.
namespace cases {

using namespace colt5;

inline constexpr TransformerBlockConfig small_block{.dim = 64,
                                                    .num_heavy_attn_tokens_q = 16,
                                                    .num_heavy_attn_tokens_kv = 16,
                                                    .num_heavy_ff_tokens = 16,
                                                    .light_dim_head = 16,
                                                    .light_heads = 4,
                                                    .heavy_dim_head = 16,
                                                    .heavy_heads = 4,
                                                    .router_kwargs = {.coor_descent = {.score_scale = 0.125}}};

/// A block with its tokens, and what it computes.
template <typename T>
struct BlockOnce {
    using Block = ConditionalRoutedTransformerBlock<small_block, T, Cuda>;
    struct Both {
        TokensTensor<T, Cuda> out, d_tokens;
        std::vector<RoutingSummary<accumulate_t<T>, Cuda>> routers;
    };

    explicit BlockOnce(const Cuda& policy_ = Cuda(), Index length = 300)
        : policy(policy_),
          block(policy, Seed{0}),
          tokens(policy, {2, length, small_block.dim}),
          gradients(block.make_gradients()) {
        fill_normal(policy, tokens, Random(Seed{1}));
    }

    TokensTensor<T, Cuda> infer() const { return block(tokens); }
    Both forward_and_backward() {
        zero_gradients<Block>(policy, gradients);
        auto saved = block.forward(tokens);
        Both both;
        saved.each_router(
            [&](const std::string&, const auto& view) { both.routers.push_back(summarize(policy, view)); });
        both.d_tokens = block.backward(saved, saved.out, gradients);
        both.out = std::move(saved.out);
        return both;
    }
    template <typename V>
    std::vector<double> values(const V& tensor) const {
        return numbers(policy, tensor);
    }
    /// The output, the gradient of the tokens and those of all parameters, and what the routers have chosen.
    std::vector<double> values(const Both& both) const {
        std::vector<double> all = values(both.out);
        const auto append = [&](const std::vector<double>& more) { all.insert(all.end(), more.begin(), more.end()); };
        append(values(both.d_tokens));
        Block::each_parameter([&](const std::string&, const auto& gradient) { append(values(gradient)); }, "",
                              gradients);
        for (const auto& router : both.routers) {
            append(values(router.live));
            append(values(router.thresholds));
        }
        return all;
    }
    std::vector<double> run() { return values(forward_and_backward()); }

    Cuda policy;
    Block block;
    TokensTensor<T, Cuda> tokens;
    typename Block::Gradients gradients;
};

}  // namespace cases
