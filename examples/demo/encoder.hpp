// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <colt5/colt5.hpp>

#include "result.hpp"

namespace demo {

using colt5::Cpu;
using colt5::TokenIndex;
using Tokens = colt5::TokensTensor<float, Cpu>;  // (b, n, d)

inline constexpr Index dim = 64;

inline constexpr colt5::TransformerBlockConfig block_config{
    .dim = dim,
    .num_heavy_attn_tokens_q = heavy_tokens,
    .num_heavy_attn_tokens_kv = heavy_tokens,
    .num_heavy_ff_tokens = heavy_tokens,
    .light_dim_head = 8,
    .light_heads = 2,
    .light_window_size = light_window,
    .heavy_dim_head = 16,
    .heavy_heads = 4,
    .router_straight_through = false,
    .router_kwargs = {.coor_descent = {.score_scale = 0.125, .iterate_to_convergence = true}}};  // 0.125 = 1 / √dim

/// Bytes to tokens. Attention has no notion of order, so each token also knows the bytes before it:
///
///     x[b, i] = Σ_j table[j][bytes[b, i − j]],  j = 0 … width − 1
///
/// that is a short convolution of one-hot bytes; before the beginning lies byte 0.
struct ByteEmbedding {
    using Gradients = ByteEmbedding;
    static constexpr Index width = 8;

    Tokens table;  // (1, width · 256, d)

    ByteEmbedding() = default;
    ByteEmbedding(const Cpu& policy, colt5::SeedSequence& seeds) : table(policy, {1, width * 256, dim}) {
        fill_normal(policy, table, seeds.next(), 1 / std::sqrt(double{width}));
    }

    struct Activations {
        Tokens out;                                                                  // (b, n, d)
        colt5::Tensor<TokenIndex, Cpu, colt5::dynamic, colt5::dynamic> rows[width];  // (1, b · n): of the table
    };

    Activations forward(const Cpu& policy, const Batch& batch) const {
        const Index count = batch.size() * batch.length;
        Activations saved{.out = {policy, {batch.size(), batch.length, dim}}, .rows = {}};
        const auto out = saved.out.view().reshape(std::array<Index, 3>{1, count, dim});
        assign(policy, out, 0);
        for (Index j = 0; j < width; ++j) {
            auto& rows = saved.rows[j] = {policy, {1, count}};
            for (Index i = 0; i < count; ++i)
                rows.data()[i] = static_cast<TokenIndex>(
                    256 * j + (i % batch.length < j ? 0 : batch.bytes[static_cast<std::size_t>(i - j)]));
            assign(policy, out, out + gather(policy, table, rows));
        }
        return saved;
    }

    void backward(const Cpu& policy, const Activations& saved, const Tokens& d_out, Gradients& gradients) const {
        const auto d = d_out.view().reshape(std::array<Index, 3>{1, d_out.extent(0) * d_out.extent(1), dim});
        for (const auto& rows : saved.rows) gather_vjp(policy, gradients.table.view(), d, rows);
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        f(prefix + "table", m.table...);
    }
};

/// A byte-level encoder: embedding, CoLT5 blocks, and at the places of the answers a norm and a linear map to ten
/// digits.
template <template <colt5::RouterConfig, typename, typename> class Router>
class Encoder {
public:
    using Block = colt5::ConditionalRoutedTransformerBlock<block_config, float, Cpu, Router>;
    using Places = colt5::MatrixView<const TokenIndex>;  // (b, answers)

    ByteEmbedding embedding;
    std::array<Block, layers> blocks;
    colt5::RMSNorm<float, Cpu> norm;
    colt5::Linear<float, Cpu> head;

    struct Gradients {
        ByteEmbedding::Gradients embedding;
        std::array<typename Block::Gradients, layers> blocks;
        colt5::RMSNorm<float, Cpu>::Gradients norm;
        colt5::Linear<float, Cpu>::Gradients head;
    };
    struct Activations {
        ByteEmbedding::Activations embedded;
        std::vector<typename Block::Activations> blocks;
        Places places;
        Tokens picked, normed;  // (b, answers, d)
        Tokens logits;          // (b, answers, 10)
    };

    Encoder(const Cpu& policy, colt5::SeedSequence seeds)
        : embedding(policy, seeds),
          blocks{Block(policy, seeds), Block(policy, seeds)},
          norm(policy, dim),
          head(policy, seeds, dim, 10, true),
          policy_(policy) {}

    /// `batch` must outlive what is returned.
    Activations forward(const Batch& batch) const {
        Activations saved;
        saved.embedded = embedding.forward(policy_, batch);
        saved.blocks.reserve(layers);
        for (const Block& block : blocks) {
            const Tokens& x = saved.blocks.empty() ? saved.embedded.out : saved.blocks.back().out;
            saved.blocks.push_back(block.forward(x));  // (b, n, d)
        }
        saved.places = Places(batch.answer_places.data(), {batch.size(), answers});
        saved.picked = gather(policy_, saved.blocks.back().out, saved.places);  // (b, answers, d)
        saved.normed = norm(policy_, saved.picked);
        saved.logits = head(policy_, saved.normed);  // (b, answers, 10)
        return saved;
    }

    void backward(const Activations& saved, const Tokens& d_logits, Gradients& gradients) const {
        const auto d_normed = head.backward(policy_, d_logits, saved.normed, gradients.head);
        const auto d_picked = norm.backward(policy_, d_normed, saved.picked, gradients.norm);
        auto d_x = tensor_like(policy_, saved.embedded.out);
        assign(policy_, d_x, 0);
        gather_vjp(policy_, d_x.view(), d_picked, saved.places);
        for (std::size_t i = layers; i-- > 0;) d_x = blocks[i].backward(saved.blocks[i], d_x, gradients.blocks[i]);
        embedding.backward(policy_, saved.embedded, d_x, gradients.embedding);
    }

    Gradients make_gradients() const { return zeros_like_parameters(policy_, *this); }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        ByteEmbedding::each_parameter(f, prefix + "embedding.", m.embedding...);
        for (std::size_t i = 0; i < layers; ++i)
            Block::each_parameter(f, prefix + "blocks." + std::to_string(i) + ".", m.blocks[i]...);
        colt5::RMSNorm<float, Cpu>::each_parameter(f, prefix + "norm.", m.norm...);
        colt5::Linear<float, Cpu>::each_parameter(f, prefix + "head.", m.head...);
    }

private:
    Cpu policy_;
};

}  // namespace demo
