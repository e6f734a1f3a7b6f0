// SPDX-License-Identifier: MIT
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "router.hpp"
#include "tasks.hpp"

namespace experiment {

using colt5::TokensTensor;

/// Maps bytes to tokens. Each also depends on the 7 bytes before it, as heavy attention has no positions:
///
///     x[b, i] = Σ_j table[j][ids[b, i − j]],  j = 0 … width − 1
template <typename Scalar, typename P>
struct ByteContext {
    static constexpr Index width = 8;
    using Ids = colt5::MatrixTensor<TokenIndex, P>;
    using Gradients = ByteContext<colt5::accumulate_t<Scalar>, P>;

    colt5::Embedding<Scalar, P> table;  // (width · symbols, d)

    ByteContext() = default;
    ByteContext(const P& policy, colt5::SeedSequence& seeds, Index dim)
        : table(policy, seeds, width * symbols, dim, 1 / std::sqrt(double{width})) {}

    /// The rows of the table that each token sums, one (b, n) for each j. Before a sequence, bytes are 0.
    static std::vector<Ids> rows_of(const P& policy, const Batch& batch) {
        std::vector<Ids> rows;
        std::vector<TokenIndex> shifted(batch.ids.size());
        for (Index j = 0; j < width; ++j) {
            for (std::size_t i = 0; i < shifted.size(); ++i) {
                const bool before = static_cast<Index>(i) % batch.length < j;
                shifted[i] =
                    static_cast<TokenIndex>(j * symbols) + (before ? 0 : batch.ids[i - static_cast<std::size_t>(j)]);
            }
            rows.emplace_back(policy, std::array{batch.size, batch.length});
            upload(policy, rows.back().data(), shifted.data(), shifted.size() * sizeof(TokenIndex));
        }
        return rows;
    }
    TokensTensor<Scalar, P> operator()(const P& policy, const std::vector<Ids>& rows) const {
        auto x = table(policy, rows[0]);
        for (std::size_t j = 1; j < rows.size(); ++j) assign(policy, x, x + table(policy, rows[j]));
        return x;
    }
    void backward(const P& policy, const TokensTensor<Scalar, P>& d_x, const std::vector<Ids>& rows,
                  Gradients& gradients) const {
        for (const Ids& ids : rows) table.backward(policy, d_x, ids, gradients.table);
    }
    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        colt5::Embedding<Scalar, P>::each_parameter(f, prefix + "table.", m.table...);
    }
};

/// The blocks of a size. Each call says how many tokens are routed.
template <Size size, bool causal>
constexpr colt5::TransformerBlockConfig block_config() {
    return {.dim = size.dim,
            .num_heavy_attn_tokens_q = size.length / size.share,
            .num_heavy_attn_tokens_kv = size.length / size.share,
            .num_heavy_ff_tokens = size.length / size.share,
            .light_dim_head = size.light_dim_head,
            .light_heads = size.light_heads,
            .light_window_size = size.light_window,
            .heavy_dim_head = size.heavy_dim_head,
            .heavy_heads = size.heavy_heads,
            .light_ff_mult = size.light_ff_mult,
            .heavy_ff_mult = size.heavy_ff_mult,
            .router_type = causal ? colt5::RouterType::causal : colt5::RouterType::coor_descent,
            .router_kwargs = {.causal = {.rate = 1 / static_cast<double>(size.share), .block_size = 128}},
            .light_rotary_emb = true};
}

/// ByteContext, CoLT5 blocks, norm, and a linear map to the logits of bytes.
template <Size size, bool causal, typename Scalar, typename P>
class Model {
public:
    static constexpr colt5::TransformerBlockConfig config = block_config<size, causal>();
    using Block = colt5::ConditionalRoutedTransformerBlock<config, Scalar, P, ArmRouter>;
    using Blocks = colt5::Stack<Block, static_cast<std::size_t>(size.depth)>;
    using Logit = colt5::accumulate_t<Scalar>;
    using Tokens = TokensTensor<Scalar, P>;

    ByteContext<Scalar, P> bytes;
    Blocks blocks;
    colt5::RMSNorm<Scalar, P> norm;
    colt5::Linear<Scalar, P> head;

    struct Gradients {
        using Module = Model;
        typename ByteContext<Scalar, P>::Gradients bytes;
        typename Blocks::Gradients blocks;
        typename colt5::RMSNorm<Scalar, P>::Gradients norm;
        typename colt5::Linear<Scalar, P>::Gradients head;
    };

    Model(const P& policy, const Size& now, Arm arm, colt5::SeedSequence seeds)
        : bytes(policy, seeds, size.dim),
          blocks(policy, seeds),
          norm(policy, size.dim),
          head(policy, seeds, size.dim, 256, false),
          policy_(policy),
          size_(now),
          gate_(policy, arm, now.dim, now.share, now.length, seeds.next_seed()) {
        for (Block& block : blocks.layers) {
            block.conditional_attn.q_router.gate = &gate_;
            block.conditional_attn.kv_router.gate = &gate_;
            block.conditional_ff.router.gate = &gate_;
            if (arm == Arm::light)
                static_cast<colt5::FeedForward<Scalar, P>&>(block.conditional_ff.light_ff) = {
                    policy, seeds, size.dim, light_hidden(now, arm, causal)};
        }
    }
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;

    /// The losses (b, m) in nats at the batch's places, and whether the most probable byte is right, 1 or 0 (b, m).
    std::pair<colt5::MatrixTensor<Logit, P>, colt5::MatrixTensor<Logit, P>> evaluate(const Batch& batch) const {
        const auto x = blocks(bytes(policy_, bytes.rows_of(policy_, batch)), {}, counts(batch.length));
        const auto normed = norm(policy_, at_places(x, batch));                     // (b, m, d)
        const auto targets = on_device(batch.targets, batch);                       // (b, m)
        auto losses = linear_cross_entropy(policy_, normed, head.weight, targets);  // (b, m)
        const auto logits = head(policy_, normed);                                  // (b, m, 256)
        auto right = tensor_like(policy_, losses);
        colt5::VectorTensor<Logit, P> target(policy_, {targets.size()});
        assign(policy_, target, colt5::cast<Logit>(targets.view().reshape(target.shape())));
        const auto in_float = colt5::cast<Logit>(logits);
        const auto of_target = row_sum(select(colt5::column_numbers<Logit>() == column(target), in_float, Logit(0)));
        assign(policy_, right.view().reshape(target.shape()), colt5::cast<Logit>(of_target >= row_max(in_float)));
        return {std::move(losses), std::move(right)};
    }

    /// The mean loss in nats. Adds its gradient.
    double add_gradients(const Batch& batch, Gradients& gradients) const {
        const auto rows = bytes.rows_of(policy_, batch);
        const auto x = bytes(policy_, rows);                       // (b, n, d)
        auto saved = blocks.forward(x, {}, counts(batch.length));  // saved.out (b, n, d)
        const auto picked = at_places(saved.out, batch);           // (b, m, d)
        const auto normed = norm(policy_, picked);
        const auto targets = on_device(batch.targets, batch);
        colt5::MatrixTensor<Logit, P> d_losses(policy_, targets.shape());
        assign(policy_, d_losses, 1 / static_cast<Logit>(targets.size()));
        const auto loss =
            linear_cross_entropy_vjp(policy_, d_losses, normed, head.weight, targets, gradients.head.weight.view());
        auto d_x = norm.backward(policy_, loss.d_x, picked, gradients.norm);
        if (!batch.places.empty()) {
            const auto d_picked = std::move(d_x);
            d_x = tensor_like(policy_, x);
            set_zero(policy_, d_x);
            gather_vjp(policy_, d_x.view(), d_picked, on_device(batch.places, batch));
        }
        d_x = blocks.backward(std::move(saved), d_x, gradients.blocks);
        bytes.backward(policy_, d_x, rows, gradients.bytes);
        return mean(loss.losses);
    }

    std::vector<Logit> losses(const Batch& batch) const { return to_host(policy_, evaluate(batch).first); }
    double mean(const colt5::MatrixTensor<Logit, P>& values) const {
        double sum = 0;
        for (const Logit value : to_host(policy_, values)) sum += static_cast<double>(value);
        return sum / static_cast<double>(values.size());
    }

    Gradients make_gradients() const { return colt5::zeros_like_parameters(policy_, *this); }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        ByteContext<Scalar, P>::each_parameter(f, prefix + "bytes.", m.bytes...);
        Blocks::each_parameter(f, prefix + "blocks.", m.blocks...);
        colt5::RMSNorm<Scalar, P>::each_parameter(f, prefix + "norm.", m.norm...);
        colt5::Linear<Scalar, P>::each_parameter(f, prefix + "head.", m.head...);
    }

private:
    colt5::TransformerBlockCounts counts(Index length) const {
        // The rate and budget of a causal router limit its choice; `length` adds no other limit.
        const Index k = gate_.arm == Arm::light ? 1 : causal ? length : routed_tokens(size_, gate_.arm, length);
        return {.num_heavy_attn_tokens_q = k, .num_heavy_attn_tokens_kv = k, .num_heavy_ff_tokens = k};
    }
    auto on_device(const std::vector<TokenIndex>& numbers, const Batch& batch) const {
        colt5::MatrixTensor<TokenIndex, P> tensor(policy_,
                                                  {batch.size, static_cast<Index>(numbers.size()) / batch.size});
        upload(policy_, tensor.data(), numbers.data(), numbers.size() * sizeof(TokenIndex));
        return tensor;
    }
    Tokens at_places(const Tokens& x, const Batch& batch) const {
        if (!batch.places.empty()) return gather(policy_, x, on_device(batch.places, batch));
        auto all = tensor_like(policy_, x);
        assign(policy_, all, x);
        return all;
    }

    P policy_;
    Size size_;
    Gate<Scalar, P> gate_;
};

}  // namespace experiment
